"""Matrix products of experts, and the barriers that keep XLA's compilers from making slower programs of them.

Every function computes what its docstring says on every platform. Barriers and orders of factors change the program
alone; each is there because a measured compiler does worse without it.
"""

from functools import partial

import jax
import jax.numpy as jnp


def save_for_backward(x: jax.Array) -> jax.Array:
    """x, as the input of a product whose weight is trained.

    The weight's gradient wants x transposed. Behind a barrier that is a copy of x, without which XLA's CPU compiler
    computes x anew for it, from the first block's residual stream on. On a GPU x is read as it is.
    """
    return jax.lax.platform_dependent(x, cuda=_unchanged, default=jax.lax.optimization_barrier)


def unfused_on_gpu(x: jax.Array) -> jax.Array:
    """x, as the input of a product that is not to be merged with another product of x.

    On a GPU one product of the experts' and the base's would be made, and the bias and their sum be added apart.
    """
    return jax.lax.platform_dependent(x, cuda=jax.lax.optimization_barrier, default=_unchanged)


def _unchanged(x: jax.Array) -> jax.Array:
    return x


@jax.custom_vjp
def expert_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] @ weight [in, out] in x's dtype; the weight's gradient is a float32 sum over tokens and devices."""
    return unfused_on_gpu(x) @ weight.astype(x.dtype)


def _expert_product_forward(x: jax.Array, weight: jax.Array):
    return expert_product(x, weight), (x, weight)


def _expert_product_backward(saved, gradient: jax.Array):
    x, weight = saved
    by_x = gradient @ weight.astype(x.dtype).T
    by_weight = sum_over_tokens(x, gradient, narrow_out=weight.shape[0] > weight.shape[1])
    return by_x, by_weight.astype(weight.dtype)


expert_product.defvjp(_expert_product_forward, _expert_product_backward)


def sum_over_tokens(x: jax.Array, gradient: jax.Array, *, narrow_out: bool) -> jax.Array:
    """Σ over all tokens of x ⊗ gradient: [..., in] and [..., out] -> [in, out] in float32.

    narrow_out: out < in. XLA's CPU compiler transposes the first factor in memory: that had better be the narrow one.
    """
    tokens = tuple(range(x.ndim - 1))
    summed = partial(
        jax.lax.dot_general, dimension_numbers=((tokens, tokens), ((), ())), preferred_element_type=jnp.float32
    )

    def narrow_first(x: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(summed(gradient, x)).T

    return (
        jax.lax.platform_dependent(x, gradient, cpu=narrow_first, default=summed) if narrow_out else summed(x, gradient)
    )
