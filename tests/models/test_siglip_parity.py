"""Compares SigLIP, the Redux embedder and preprocessing with transformers and diffusers, on random float32 weights."""

import json
import subprocess
import sys
from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from PIL import Image

from ra_jax.errors import WeightError
from ra_jax.interop.diffusers import load_redux, save_redux
from ra_jax.models.siglip import Redux, ReduxConfig, SiglipConfig, SiglipVision, preprocess

if find_spec("torch"):
    import diffusers
    import torch


# 30 is not a multiple of 7, just as SigLIP so400m's 384 is not a multiple of 14.
VISION = SiglipConfig(
    hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4, image_size=30, patch_size=7
)
EMBEDDER = ReduxConfig(redux_dim=32, txt_in_features=24)
run = nnx.jit(lambda module, pixels: module(pixels))


def relative_error(ours, theirs: "torch.Tensor") -> float:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def randomize(module: "torch.nn.Module") -> "torch.nn.Module":
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def write_redux(folder, config: transformers.SiglipVisionConfig):
    """Write a Redux folder as diffusers does, and return its vision model and embedder."""
    torch.manual_seed(0)
    vision = randomize(transformers.SiglipVisionModel(config))
    embedder = randomize(diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder(32, 24))
    vision.save_pretrained(folder / "image_encoder")
    embedder.save_pretrained(folder / "image_embedder")
    return vision, embedder


@pytest.mark.torch
@pytest.mark.parametrize("hidden_act", ["gelu_pytorch_tanh", "gelu", "quick_gelu"])
def test_vision_model_and_embedder_match_transformers_and_diffusers(tmp_path, hidden_act):
    # transformers also writes the pooling head, which follows the last hidden state.
    config = {**VISION.to_dict(), "vision_use_head": True, "hidden_act": hidden_act}
    vision, embedder = write_redux(tmp_path, transformers.SiglipVisionConfig.from_dict(config))
    redux = load_redux(tmp_path)
    pixels = np.random.default_rng(0).normal(size=(2, 30, 30, 3)).astype(np.float32)

    hidden = vision(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state
    assert relative_error(run(redux.vision, pixels), hidden) <= 1e-4
    assert relative_error(run(redux, pixels), embedder(hidden).image_embeds) <= 1e-4


@pytest.mark.torch
def test_the_vision_part_of_a_saved_whole_siglip_model_is_loaded(tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config=text | {"vocab_size": 8, "max_position_embeddings": 4, "projection_size": 32},
        vision_config={**VISION.to_dict(), "vision_use_head": True},
    )
    torch.manual_seed(0)
    whole_model = randomize(transformers.SiglipModel(config))
    write_redux(tmp_path, transformers.SiglipVisionConfig.from_dict(VISION.to_dict()))
    whole_model.save_pretrained(tmp_path / "image_encoder")

    pixels = np.random.default_rng(0).normal(size=(1, 30, 30, 3)).astype(np.float32)
    theirs = whole_model.vision_model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state
    assert relative_error(run(load_redux(tmp_path).vision, pixels), theirs) <= 1e-4


@pytest.fixture
def redux_folder(tmp_path):
    save_redux(Redux(VISION, EMBEDDER, rngs=nnx.Rngs(0)), tmp_path)
    return tmp_path


@pytest.mark.torch
@pytest.mark.parametrize(("mode", "size"), [("RGB", (41, 23)), ("RGBA", (30, 30)), ("L", (9, 64))])
def test_preprocess_matches_transformers(redux_folder, mode, size):
    bands = len(mode)
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], bands), np.uint8).squeeze()
    image = Image.fromarray(values)
    processor = transformers.AutoImageProcessor.from_pretrained(redux_folder / "feature_extractor", use_fast=False)
    theirs = processor.preprocess(image, do_resize=True, do_convert_rgb=True, return_tensors="np")["pixel_values"][0]

    ours = preprocess(redux_folder)(image)
    assert ours.shape == (30, 30, 3)
    assert ours.dtype == np.float32
    assert -1 <= ours.min() < ours.max() <= 1
    np.testing.assert_array_equal(ours, theirs.transpose(1, 2, 0))


def test_preprocess_of_an_image_of_the_model_size_only_normalizes(redux_folder):
    values = np.random.default_rng(2).integers(0, 256, (30, 30, 3), np.uint8)
    np.testing.assert_allclose(preprocess(redux_folder)(Image.fromarray(values)), values / 127.5 - 1.0, atol=1e-6)


def test_preprocess_needs_no_torch(redux_folder):
    script = f"""
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
from PIL import Image
from ra_jax.models.siglip import preprocess
print(preprocess({str(redux_folder)!r})(Image.new("RGB", (8, 8), (255, 0, 0))).mean((0, 1)).tolist())
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == [1.0, -1.0, -1.0]


@pytest.mark.torch
def test_configs_are_read_and_written():
    theirs = transformers.SiglipVisionConfig.from_dict(VISION.to_dict())
    assert SiglipConfig.from_dict(json.loads(theirs.to_json_string(use_diff=False))) == VISION
    assert SiglipConfig.from_dict({"vision_config": VISION.to_dict()}) == VISION
    assert SiglipConfig.from_dict({}) == SiglipConfig()
    assert ReduxConfig.from_dict(EMBEDDER.to_dict()) == EMBEDDER
    assert SiglipConfig(image_size=384, patch_size=14).num_tokens == 729


@pytest.mark.parametrize(
    ("config", "content", "message"),
    [
        (SiglipConfig, {"hidden_act": "relu"}, "hidden_act is 'relu': expected one of gelu_pytorch_tanh, gelu"),
        (SiglipConfig, {"num_attention_heads": 7}, "num_attention_heads is 7: expected a divisor of hidden_size, 768"),
        (SiglipConfig, {"patch_size": [14, 14]}, r"patch_size is \[14, 14\]: expected one integer"),
        (
            ReduxConfig,
            {"redux_dims": 3},
            r"image_embedder config: unknown key 'redux_dims' \(nearest known: 'redux_dim'",
        ),
    ],
)
def test_wrong_configs_are_refused(config, content, message):
    with pytest.raises(ValueError, match=message):
        config.from_dict(content)


def test_wrong_sizes_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"redux_dim is 32: expected the image encoder's hidden_size, 768"):
        Redux(SiglipConfig(), EMBEDDER, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"pixels have shape \(1, 28, 28, 3\): expected \[B, 30, 30, 3\]"):
        SiglipVision(VISION, rngs=nnx.Rngs(0))(jnp.zeros((1, 28, 28, 3)))
    with pytest.raises(
        WeightError, match=r"preprocessor_config.json does not exist: expected a folder of FLUX.1-Redux"
    ):
        preprocess(tmp_path)
