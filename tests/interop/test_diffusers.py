"""ra_jax reads folders that diffusers writes, and diffusers reads folders that ra_jax writes, bit for bit."""

import json
import shutil
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

from ra_jax.errors import WeightError
from ra_jax.interop import safetensors_io as weight_files
from ra_jax.interop.diffusers import (
    load_flux,
    load_redux,
    load_vae,
    read_configs,
    save_fill_pipeline_config,
    save_flux,
    save_redux,
    save_vae,
)
from ra_jax.models.flux import FluxOptions
from ra_jax.models.lora import LoRAConfig
from ra_jax.models.siglip import ReduxConfig, preprocess

if find_spec("torch"):
    import diffusers
    import torch


NO_TEXT = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


@pytest.fixture(scope="module")
def diffusers_folder(models, tmp_path_factory):
    """One folder with a Fill and a Redux model of random float32 weights, written by diffusers and transformers."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    vision = transformers.SiglipVisionConfig.from_dict(models.redux.vision.config.to_dict())
    components = {
        "transformer": diffusers.FluxTransformer2DModel.from_config(models.flux.config.to_dict()),
        "vae": diffusers.AutoencoderKL.from_config(models.vae.config.to_dict()),
        "image_encoder": transformers.SiglipVisionModel(vision),
        "image_embedder": diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder(16, 24),
    }
    for name, model in components.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return folder


def read_with_diffusers(folder, dtype: str = "float32"):
    """Load every component in `folder` with from_pretrained; returns their tensors by COMPONENT.NAME."""
    dtype = getattr(torch, dtype)
    redux = diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder
    models = {
        "transformer": diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype),
        "image_encoder": transformers.SiglipVisionModel.from_pretrained(folder / "image_encoder", dtype=dtype),
        "image_embedder": redux.from_pretrained(folder / "image_embedder", torch_dtype=dtype),
    }
    return {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}


def assert_equal_tensors(tensors: dict, expected: dict):
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value), name


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_diffusers_weights_that_are_loaded_and_saved_are_bit_equal(diffusers_folder, tmp_path, dtype):
    save_flux(load_flux(diffusers_folder, FluxOptions(param_dtype=dtype)), tmp_path)
    save_vae(load_vae(diffusers_folder, param_dtype=dtype), tmp_path)
    save_redux(load_redux(diffusers_folder, param_dtype=dtype), tmp_path)
    expected = read_with_diffusers(diffusers_folder, dtype)
    assert_equal_tensors(read_with_diffusers(tmp_path, dtype), expected)
    files = [load_file(file) for file in tmp_path.glob("*/*.safetensors")]
    assert {value.dtype for file in files for value in file.values()} == {jnp.dtype(dtype)}


@pytest.mark.torch
def test_our_weights_that_diffusers_loads_and_saves_are_bit_equal(models, model_folder, tmp_path):
    for component, model, diffusers_class, load in (
        ("transformer", models.flux, diffusers.FluxTransformer2DModel, load_flux),
        ("vae", models.vae, diffusers.AutoencoderKL, load_vae),
    ):
        diffusers_class.from_pretrained(model_folder / component).save_pretrained(tmp_path / component)
        loaded = load(tmp_path)
        assert loaded.config == model.config
        jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))


@pytest.mark.torch
def test_shards_that_diffusers_writes_are_read(diffusers_folder, tmp_path):
    model = diffusers.FluxTransformer2DModel.from_pretrained(diffusers_folder / "transformer")
    model.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_flux(tmp_path)), nnx.state(load_flux(diffusers_folder)))


@pytest.mark.torch
def test_diffusers_reads_our_shards_which_replace_earlier_files(diffusers_folder, tmp_path, monkeypatch):
    flux, redux = load_flux(diffusers_folder), load_redux(diffusers_folder)
    save_flux(flux, tmp_path)
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 20_000)
    save_flux(flux, tmp_path)
    save_redux(redux, tmp_path)
    shutil.copytree(diffusers_folder / "vae", tmp_path / "vae")
    shards = list((tmp_path / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(file.stat().st_size < 25_000 for file in shards)
    assert len(list((tmp_path / "image_encoder").glob("model-*.safetensors"))) > 1
    assert_equal_tensors(read_with_diffusers(tmp_path), read_with_diffusers(diffusers_folder))
    load_flux(tmp_path)


@pytest.mark.torch
def test_diffusers_loads_our_folders_as_pipelines(models, copied_folder, tmp_path):
    save_fill_pipeline_config(copied_folder, {"max_shift": 0.9})
    redux = models.redux
    save_redux(redux, tmp_path / "redux")

    fill_pipe = diffusers.FluxFillPipeline.from_pretrained(copied_folder, **NO_TEXT)
    assert fill_pipe.vae.config.shift_factor == 0.25
    assert fill_pipe.scheduler.config.max_shift == 0.9
    assert fill_pipe.scheduler.config.use_dynamic_shifting
    redux_pipe = diffusers.FluxPriorReduxPipeline.from_pretrained(tmp_path / "redux")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8))
    expected = redux_pipe.image_embedder(redux_pipe.encode_image(image, "cpu", 1)).image_embeds.detach().numpy()
    tokens = redux(preprocess(tmp_path / "redux")(image)[None])
    np.testing.assert_allclose(tokens, expected, atol=1e-4 * np.abs(expected).max())


def test_experts_are_newly_initialized_and_not_saved_with_the_base(model_folder, tmp_path):
    lora = LoRAConfig(num_experts=2, rank=3, alpha=3.0, target_modules=r"attn\.to_q$")
    flux = load_flux(model_folder, lora=lora, rngs=nnx.Rngs(0))
    experts = nnx.to_flat_state(nnx.state(flux, nnx.LoRAParam))
    assert [path[-1] for path, _ in experts] == ["lora_a", "lora_b"] * 2
    for path, expert in experts:
        assert bool(jnp.any(expert[...])) == (path[-1] == "lora_a")
    save_flux(flux, tmp_path)
    base = nnx.state(load_flux(model_folder))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_flux(tmp_path)), base)
    with pytest.raises(ValueError, match=r"rngs is None: expected nnx.Rngs"):
        load_flux(model_folder, lora=lora)


def test_configs_are_read_without_weights(models, copied_folder):
    for file in copied_folder.glob("*/*.safetensors"):
        file.unlink()
    flux, vae, vision, embedder = read_configs(copied_folder, copied_folder)
    assert (flux, vae) == (models.flux.config, models.vae.config)
    assert (vision, embedder) == (models.redux.vision.config, models.redux.embedder.config)
    assert read_configs(copied_folder, None) == (flux, vae, None, None)


def change_config(key, value):
    def change(file):
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), r"vae.config.json does not exist: expected the folder of a pipeline"),
        (lambda file: file.write_text("{"), r"vae.config.json: Expecting property name"),
        (change_config("_class_name", "VQModel"), r"config.json: describes a VQModel; expected AutoencoderKL"),
        (change_config("norm_type", "spatial"), r"config.json: vae config: unknown key 'norm_type'"),
    ],
)
def test_missing_broken_and_unsuitable_configs_are_refused(copied_folder, damage, message):
    damage(copied_folder / "vae" / "config.json")
    with pytest.raises(WeightError, match=message):
        load_vae(copied_folder)


def test_image_encoder_and_embedder_of_different_models_are_refused(copied_folder):
    (copied_folder / "image_embedder" / "config.json").write_text(json.dumps(ReduxConfig().to_dict()))
    with pytest.raises(WeightError, match=r"redux_dim is 1152: expected the image encoder's hidden_size, 16"):
        load_redux(copied_folder)


def test_unknown_scheduler_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"scheduler has unknown keys \['shfit'\]: the known keys are"):
        save_fill_pipeline_config(tmp_path, {"shfit": 1.0})
