"""Compares packing and the Fill channels with diffusers' FluxFillPipeline."""

from importlib.util import find_spec
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ra_jax.models.conditioning import context_tokens, pack, pack_mask, token_mask, unpack

if find_spec("torch"):
    import torch
    from diffusers import FluxFillPipeline

RNG = np.random.default_rng(0)


def channels_first(x: np.ndarray) -> "torch.Tensor":
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(2, 4, 4, 16), (1, 6, 10, 3)], ids=["square", "oblong"])
def test_packing_and_unpacking_of_latents_match_diffusers(shape):
    b, height, width, channels = shape
    latents = RNG.normal(size=shape).astype(np.float32)
    theirs = FluxFillPipeline._pack_latents(channels_first(latents), b, channels, height, width)
    packed = pack(latents)
    np.testing.assert_array_equal(packed, theirs)

    unpacked = unpack(packed, (height // 2, width // 2))
    np.testing.assert_array_equal(unpacked, latents)
    theirs = FluxFillPipeline._unpack_latents(theirs, 8 * height, 8 * width, vae_scale_factor=8)
    np.testing.assert_array_equal(channels_first(np.asarray(unpacked)), theirs)


@pytest.mark.torch
@pytest.mark.parametrize("factor", [4, 8])
def test_fill_channels_match_diffusers(factor):
    b, height, width, channels = 2, 4 * factor, 6 * factor, 4
    mask = (RNG.uniform(size=(b, height, width)) > 0.5).astype(np.float32)
    latents = RNG.normal(size=(b, 4, 6, channels)).astype(np.float32)
    pipeline = SimpleNamespace(
        vae_scale_factor=factor,
        vae=SimpleNamespace(config=SimpleNamespace(shift_factor=0.0, scaling_factor=1.0)),
        _pack_latents=FluxFillPipeline._pack_latents,
    )
    settings = (b, channels, 1, height, width, torch.float32, "cpu", None)
    theirs = FluxFillPipeline.prepare_mask_latents(
        pipeline, torch.from_numpy(mask)[:, None], channels_first(latents), *settings
    )
    np.testing.assert_array_equal(pack_mask(mask, factor), theirs[0])
    np.testing.assert_array_equal(pack(latents), theirs[1])


def test_token_mask_is_the_masked_fraction_of_the_pixels_of_a_token():
    mask = (RNG.uniform(size=(2, 16, 24)) > 0.3).astype(np.float32)
    fill = np.concatenate([RNG.normal(size=(2, 6, 20)), pack_mask(mask, 4)], axis=-1)
    expected = [[m[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean() for y in range(2) for x in range(3)] for m in mask]
    np.testing.assert_allclose(token_mask(jax.numpy.asarray(fill), 20), expected, rtol=1e-5)


def test_the_context_is_the_empty_prompt_then_the_image_tokens():
    image_tokens = RNG.normal(size=(2, 3, 5)).astype(np.float32)
    context = context_tokens(image_tokens, batch=2, text_tokens=4, joint_dim=5)
    assert context.shape == (2, 7, 5)
    assert not np.any(context[:, :4])
    np.testing.assert_array_equal(context[:, 4:], image_tokens)
    np.testing.assert_array_equal(context_tokens(None, batch=1, text_tokens=2, joint_dim=5), np.zeros((1, 2, 5)))


def test_prompt_embeddings_replace_the_empty_prompt():
    text, image_tokens = RNG.normal(size=(2, 2, 3, 5)).astype(np.float32)
    context = context_tokens(image_tokens, batch=2, text_tokens=4, joint_dim=5, text=text)
    np.testing.assert_array_equal(context, np.concatenate([text, image_tokens], axis=1))
