"""Compares AutoencoderKL with diffusers', on random float32 weights."""

import json
from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ra_jax.interop.diffusers import load_vae
from ra_jax.models import vae as vae_module
from ra_jax.models.vae import AutoencoderKL, VAEConfig

if find_spec("torch"):
    import diffusers
    import torch


FACTOR_4 = VAEConfig(block_out_channels=(8, 16, 16), norm_num_groups=4, latent_channels=3, shift_factor=0.1)
FACTOR_8 = VAEConfig(block_out_channels=(8, 8, 16, 24), norm_num_groups=8, latent_channels=6, layers_per_block=2)
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
SMALL = VAEConfig(
    block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, **NO_QUANT, mid_block_add_attention=False
)
CASES = {
    "factor 4": FACTOR_4,
    "factor 4, neither quant convs nor attention": replace(FACTOR_4, **NO_QUANT, mid_block_add_attention=False),
    "factor 8": FACTOR_8,
    "factor 8, no quant convs": replace(FACTOR_8, **NO_QUANT),
}


encode, decode = nnx.jit(AutoencoderKL.encode), nnx.jit(AutoencoderKL.decode)


def relative_error(ours: jax.Array, theirs: "torch.Tensor") -> float:
    """Return the largest difference, relative to the largest value; `theirs` has channels first."""
    theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def channels_first(x: np.ndarray) -> "torch.Tensor":
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def make_pair(config, folder):
    """Return diffusers' model with random weights (norms and biases too), and ours, loaded from its folder."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL.from_config(config.to_dict()).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder / "vae")
    return theirs, load_vae(folder)


@pytest.mark.torch
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_encode_and_decode_match_diffusers_on_images_that_are_not_square(config, tmp_path):
    theirs, ours = make_pair(config, tmp_path)
    rng = np.random.default_rng(0)
    factor = ours.config.factor
    images = rng.uniform(-1, 1, (2, 6 * factor, 10 * factor, 3)).astype(np.float32)
    latents = rng.normal(size=(2, 6, 10, ours.config.latent_channels)).astype(np.float32)

    posterior = theirs.encode(channels_first(images)).latent_dist
    mean, logvar = encode(ours, images)
    assert relative_error(mean, posterior.mean) <= 1e-4
    assert relative_error(logvar, posterior.logvar) <= 1e-4
    assert relative_error(decode(ours, latents), theirs.decode(channels_first(latents)).sample) <= 1e-4


@pytest.mark.torch
def test_gradients_of_encoder_and_decoder_match_diffusers(tmp_path):
    theirs, ours = make_pair(FACTOR_4, tmp_path)
    images = np.random.default_rng(1).uniform(-1, 1, (1, 8, 16, 3)).astype(np.float32)

    torch_images = channels_first(images).requires_grad_()
    posterior = theirs.encode(torch_images).latent_dist
    (theirs.decode(posterior.mean).sample.square().mean() + posterior.logvar.mean()).backward()

    @jax.jit
    @jax.grad
    def gradient(images):
        mean, logvar = ours.encode(images)
        return jnp.square(ours.decode(mean)).mean() + logvar.mean()

    assert relative_error(gradient(images), torch_images.grad) <= 1e-4


def test_attention_in_chunks_equals_plain_attention(monkeypatch):
    monkeypatch.setattr(vae_module, "QUERY_CHUNK", 8)  # 30 queries: three full chunks and a smaller one
    query, key, value, weights = np.random.default_rng(0).normal(size=(4, 2, 30, 16)).astype(np.float32)

    def one_head(*qkv):
        return jax.nn.dot_product_attention(*(x[:, :, None] for x in qkv))[:, :, 0]

    def output_and_gradients(attend):
        def loss(*qkv):
            return (weights * attend(*qkv)).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(query, key, value)

    ours, expected = output_and_gradients(vae_module.attend), output_and_gradients(one_head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, expected)


def test_a_new_model_learns_to_reconstruct():
    vae = AutoencoderKL(SMALL, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(vae)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 2, 2, 3)).repeat(4, 1).repeat(4, 2)

    @jax.jit
    def step(params):
        def loss(params):
            vae = nnx.merge(graphdef, params)
            return jnp.square(vae.decode(vae.encode(images)[0]) - images).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.03 * g, params, gradient)

    losses = []
    for _ in range(60):
        value, params = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]


def test_normalize_subtracts_the_shift_and_scales_and_denormalize_inverts_it():
    vae = AutoencoderKL(replace(SMALL, scaling_factor=0.5, shift_factor=0.2), rngs=nnx.Rngs(0))
    latents = jnp.linspace(-2, 2, 12).reshape(1, 2, 2, 3)
    np.testing.assert_allclose(vae.normalize(latents), (latents - 0.2) * 0.5, rtol=1e-6)
    np.testing.assert_allclose(vae.denormalize(vae.normalize(latents)), latents, rtol=1e-6)


def test_a_bfloat16_encoder_differs_by_less_than_5_percent():
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    mean, half_mean = (
        encode(AutoencoderKL(SMALL, dtype=dtype, rngs=nnx.Rngs(0)), images)[0] for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half_mean.dtype == jnp.float32
    assert 0 < jnp.abs(mean - half_mean).max() < 0.05 * jnp.abs(mean).max()


@pytest.mark.torch
def test_config_of_diffusers_is_read_and_written():
    theirs = diffusers.AutoencoderKL.from_config(FACTOR_8.to_dict())
    content = json.loads(theirs.to_json_string())
    assert VAEConfig.from_dict(content) == FACTOR_8
    assert VAEConfig.from_dict(FACTOR_8.to_dict()) == FACTOR_8
    assert VAEConfig.from_dict({"shift_factor": None}).shift_factor == 0.0
    assert VAEConfig.from_dict(json.loads(diffusers.AutoencoderKL().to_json_string())) == VAEConfig()
    assert (FACTOR_4.factor, FACTOR_8.factor) == (4, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"block_out_channel": [64]}, r"unknown key 'block_out_channel' \(nearest known: 'block_out_channels'\)"),
        ({"act_fn": "relu"}, "act_fn is 'relu', but only 'silu' is supported"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"]}, "only .'UpDecoderBlock2D'. is supported"),
        ({"block_out_channels": [32, 48]}, r"block_out_channels is \[32, 48\]: expected one or more multiples of"),
    ],
)
def test_wrong_configs_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict(content)


def test_wrong_shapes_are_refused():
    vae = AutoencoderKL(SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"images have shape \(1, 17, 16, 3\): .* H and W multiples of 2"):
        vae.encode(jnp.zeros((1, 17, 16, 3)))
    with pytest.raises(ValueError, match=r"latents have shape \(1, 4, 4, 12\): expected \[B, H, W, 3\]"):
        vae.decode(jnp.zeros((1, 4, 4, 12)))
