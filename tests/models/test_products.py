"""Compares the products of experts, and their gradients, with plain products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.models.products import expert_product, save_for_backward, sum_over_tokens, unfused_on_gpu


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 3), (3, 12), (5, 5)])
def test_an_expert_product_and_its_gradients_equal_those_of_a_plain_product(inputs, outputs):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 7, inputs), (inputs, outputs)))
    target = jnp.asarray(rng.normal(size=(2, 7, outputs)), jnp.float32)

    def value_and_gradients(product):
        return jax.jit(jax.value_and_grad(lambda x, w: (product(x, w) * target).sum(), argnums=(0, 1)))(x, weight)

    ours, plain = (jax.tree.leaves(value_and_gradients(product)) for product in (expert_product, jnp.matmul))
    for got, expected in zip(ours, plain, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_gradients_have_the_dtypes_of_their_arguments():
    x, weight = jnp.ones((2, 7, 4), jnp.bfloat16), jnp.ones((4, 3), jnp.float32)
    product, pullback = jax.vjp(expert_product, x, weight)
    assert product.dtype == jnp.bfloat16
    assert [gradient.dtype for gradient in pullback(product)] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("gradient_is_narrow", [False, True])
def test_a_sum_over_tokens_of_bfloat16_factors_is_exact(gradient_is_narrow):
    """The sum of 2 · 4096 ones. A sum in bfloat16 would stop growing at 256."""
    x, gradient = jnp.ones((2, 4096, 3), jnp.bfloat16), jnp.ones((2, 4096, 2), jnp.bfloat16)
    got = jax.jit(sum_over_tokens, static_argnames="gradient_is_narrow")(
        x, gradient, gradient_is_narrow=gradient_is_narrow
    )
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.full((3, 2), 8192.0))


@pytest.mark.parametrize("barrier", [save_for_backward, unfused_on_gpu])
def test_barriers_change_no_value_and_no_gradient(barrier):
    x = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
    value, gradient = jax.value_and_grad(lambda x: (barrier(x) ** 3).sum())(x)
    np.testing.assert_array_equal(value, (x**3).sum())
    np.testing.assert_allclose(gradient, 3 * x**2, rtol=1e-6)
