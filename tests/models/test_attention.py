"""Compares attention with torch and float64, and rotary positions with diffusers."""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.models.attention import attention, cudnn, implementation_for, rope_table, rotate, splash

if find_spec("torch"):
    import torch
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed


def random_qkv(seed, queries, keys, heads=3, dim=16):
    draw = np.random.default_rng(seed).normal
    return [draw(size=(2, length, heads, dim)).astype(np.float32) for length in (queries, keys, keys)]


@pytest.mark.torch
@pytest.mark.parametrize("implementation", ["xla", "by_head"])
def test_attention_matches_torch(implementation):
    arrays = random_qkv(0, 7, 11)
    expected = torch.nn.functional.scaled_dot_product_attention(*(torch.from_numpy(x).transpose(1, 2) for x in arrays))
    got = attention(*arrays, implementation=implementation)
    np.testing.assert_allclose(got, expected.transpose(1, 2).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.torch
def test_gradients_of_attention_by_head_match_torch():
    arrays = [torch.from_numpy(x).requires_grad_() for x in random_qkv(5, 7, 11)]
    weights = np.random.default_rng(6).normal(size=arrays[0].shape).astype(np.float32)
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in arrays)).transpose(1, 2)
    (out * torch.from_numpy(weights)).sum().backward()
    got = jax.grad(lambda *a: (attention(*a, implementation="by_head") * weights).sum(), argnums=(0, 1, 2))(
        *(x.detach().numpy() for x in arrays)
    )
    for ours, theirs in zip(got, arrays, strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "by_head"])
def test_softmax_is_float32_for_bfloat16_inputs(implementation):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(1, 40, 300))
    q = 8 * q  # logits of about 30, which bfloat16 rounds by 0.06
    logits = np.einsum("bqhd,bkhd->bhqk", *(np.asarray(x, np.float64) for x in (q, k))) / 4
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, np.asarray(v, np.float64))
    got = attention(q, k, v, implementation=implementation)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-7, atol=2**-7)


def compute_with_gradients(function, arrays, tokens=None):
    """Return the values of the first tokens, and the gradients of a weighted sum of them."""
    weights = np.random.default_rng(3).normal(size=arrays[0].shape).astype(np.float32)[:, :tokens]

    def total(*arrays):
        return (function(*arrays)[:, :tokens] * weights).sum()

    return function(*arrays)[:, :tokens], jax.grad(total, argnums=(0, 1, 2))(*arrays)


@pytest.mark.parametrize(("length", "tokens"), [(128, None), (300, None), (256, 200)])
def test_the_tpu_kernel_has_the_values_and_gradients_of_xla_attention(length, tokens):
    """The kernel runs in interpret mode, on padded and unpadded sequences."""
    arrays = random_qkv(2, length, length, heads=2, dim=128)
    ours = compute_with_gradients(partial(splash, tokens=tokens, interpret=True), arrays, tokens)
    theirs = compute_with_gradients(partial(attention, tokens=tokens), arrays, tokens)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-4), ours, theirs)


@pytest.mark.parametrize(("length", "tokens"), [(7, None), (8, None), (7, 5), (8, 5)])
@pytest.mark.parametrize("implementation", ["by_head", "cudnn"])
def test_keys_after_the_first_tokens_are_masked(implementation, length, tokens):
    """The case `cudnn` runs XLA's kernel, which tests the padding of odd lengths and the masking without a GPU."""
    arrays = random_qkv(4, length, length)
    function = partial(attention, implementation=implementation, tokens=tokens)
    if implementation == "cudnn":
        function = partial(cudnn, implementation="xla", tokens=tokens)
    expected = compute_with_gradients(
        lambda q, k, v: jax.nn.dot_product_attention(q, k[:, :tokens], v[:, :tokens]), arrays
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        compute_with_gradients(function, arrays),
        expected,
    )


def test_the_kernel_is_chosen_by_platform_dtype_head_size_and_number_of_devices():
    assert implementation_for("cpu", dtype=jnp.float32, head_dim=128) == "by_head"
    assert implementation_for("cpu", dtype=jnp.float32, head_dim=128, devices=2) == "xla"
    assert implementation_for("tpu", dtype=jnp.bfloat16, head_dim=128) == "splash"
    assert implementation_for("tpu", dtype=jnp.bfloat16, head_dim=32) == "xla"
    assert implementation_for("gpu", dtype=jnp.bfloat16, head_dim=128) == "cudnn"
    assert implementation_for("gpu", dtype=jnp.float32, head_dim=128) == "xla"


def test_an_unknown_implementation_is_refused_with_a_list_of_the_known_ones():
    with pytest.raises(ValueError, match="attention 'flash' is unknown: expected one of xla, cudnn, splash, by_head"):
        attention(*random_qkv(0, 2, 2), implementation="flash")


@pytest.mark.torch
@pytest.mark.parametrize(("context", "grid"), [(5, (3, 4)), (0, (4, 2)), (2, (60, 125))])
def test_rotary_positions_match_diffusers(context, grid):
    rows, cols = grid
    axes = (4, 6, 6)
    ids = torch.zeros(context + rows * cols, 3)
    ids[: rows * cols, 1] = torch.arange(rows).repeat_interleave(cols)
    ids[: rows * cols, 2] = torch.arange(cols).repeat(rows)
    cos, sin = FluxPosEmbed(theta=10000, axes_dim=axes)(ids)
    table = rope_table(grid, context, axes)
    for got, expected in zip((table.cos, table.sin), (cos, sin), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(jnp.repeat(got, 2, axis=-1), expected.numpy(), atol=1e-7)

    x = np.random.default_rng(0).normal(size=(1, len(ids), 2, 16)).astype(np.float32)
    expected = apply_rotary_emb(torch.from_numpy(x), (cos, sin), sequence_dim=1)
    for in_one_pass in (False, True):
        got = jax.jit(rotate)(x, replace(table, in_one_pass=in_one_pass))
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-6)
