"""Tests the rounding error of 8-bit kernels, and a model that computes with them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ra_jax.interop.diffusers import load_flux
from ra_jax.models.conditioning import Condition
from ra_jax.models.flux import FluxOptions
from ra_jax.models.lora import ExpertLinear
from ra_jax.models.quantization import quantize


def test_quantization_errors_are_uniform_and_at_most_half_a_level():
    kernel = np.random.default_rng(0).normal(size=(3072, 64)).astype(np.float32)
    kernel[:, 3] = 0.0
    values, scale = quantize(kernel)
    assert values.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (64,)
    np.testing.assert_array_equal(np.abs(values).max(0), np.where(np.arange(64) == 3, 0, 127))
    error = values * scale - kernel
    assert (np.abs(error) <= scale / 2 * (1 + 1e-5)).all()
    # Rounding errors are uniform within a level, with standard deviation scale/√12: about 0.9 % of a normal kernel's.
    nonzero = np.arange(64) != 3
    np.testing.assert_allclose(error.std(0)[nonzero], scale[nonzero] / np.sqrt(12), rtol=0.05)
    assert 0.007 < error.std() / kernel.std() < 0.010


def test_a_layer_multiplies_by_the_scaled_kernel():
    layer = ExpertLinear(5, 3, param_dtype=jnp.int8, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    layer.kernel[...] = jnp.asarray(rng.integers(-127, 128, (5, 3)), jnp.int8)
    layer.kernel_scale[...] = jnp.asarray([0.5, 0.01, 2.0])
    layer.bias[...] = jnp.asarray([1.0, -1.0, 0.0])
    x = rng.normal(size=(2, 4, 5)).astype(np.float32)
    expected = x @ (np.asarray(layer.kernel[...], np.float32) * [0.5, 0.01, 2.0]) + [1.0, -1.0, 0.0]
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5)


def test_int8_changes_only_the_kernels_of_the_blocks_of_a_loaded_base(tiny_fill):
    plain = dict(nnx.to_flat_state(nnx.state(load_flux(tiny_fill))))
    flux = load_flux(tiny_fill, FluxOptions(int8=True))
    quantized = dict(nnx.to_flat_state(nnx.state(flux)))
    kernels = 0
    for path, variable in plain.items():
        if path[-1] == "kernel" and "transformer_blocks" in path[0]:
            scale = quantized[(*path[:-1], "kernel_scale")][...]
            assert quantized[path].dtype == jnp.int8
            error = np.abs(quantized[path][...] * scale[:, None] - variable[...])  # [L, in, out]
            assert (error <= scale[:, None] / 2 * (1 + 1e-4)).all()
            kernels += 1
        else:
            np.testing.assert_array_equal(quantized[path][...], variable[...])
    assert kernels == 20 and len(quantized) == len(plain) + kernels


def test_int8_changes_velocities_by_less_than_two_percent(tiny_fill):
    rng = np.random.default_rng(2)
    plain, quantized = load_flux(tiny_fill), load_flux(tiny_fill, FluxOptions(int8=True))
    config = plain.config

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    latents, fill = jnp.split(normal(2, 12, config.in_channels), [config.out_channels], axis=-1)
    context, pooled = normal(2, 5, config.joint_attention_dim), normal(2, config.pooled_projection_dim)
    t, guidance = jnp.asarray([0.3, 0.9]), jnp.asarray([30.0, 30.0])
    condition = Condition(fill, context, pooled, (3, 4))
    ours, theirs = (jax.jit(lambda m: m(latents, t, condition, guidance))(m) for m in (quantized, plain))
    relative = float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))
    assert 1e-4 < relative < 0.02
