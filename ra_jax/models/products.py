"""Matrix products with the experts' weights, written so that XLA compiles them to fast programs.

Three tools of JAX are used here. None of them changes what a function computes, up to rounding.

* `jax.lax.optimization_barrier(x)` returns x. XLA does not merge, move or recompute operations across it.
* `jax.custom_vjp` replaces JAX's own gradient of a function by a hand-written one.
* `jax.lax.platform_dependent` uses a different program on each platform, since a barrier that saves time on one
  platform can cost time on another.

Each barrier and each order of factors is here because programs without it were measured to be slower.
"""

from functools import partial

import jax
import jax.numpy as jnp


def save_for_backward(x: jax.Array) -> jax.Array:
    """Return x unchanged, and keep XLA from recomputing x in the backward pass.

    If x is multiplied by a weight, the gradient of the weight is a product with x transposed. XLA's CPU compiler
    recomputes x for this product, starting from the residual stream of the first block. With the barrier it makes a
    transposed copy of x instead, which takes less time. GPUs read x in place. A copy would only cost time there, so
    x has no barrier on GPUs.
    """
    return jax.lax.platform_dependent(x, cuda=_identity, default=jax.lax.optimization_barrier)


def unfused_on_gpu(x: jax.Array) -> jax.Array:
    """Return x unchanged, and keep XLA's GPU compiler from merging a product of x with other products of x.

    XLA's GPU compiler merges products with the same input: the base's x W and the experts' x A become one product
    x [W A]. A separate product can add the bias, or the result of another product, before it writes its output. A
    merged product cannot: the bias and the experts' output are then added in further passes over memory. With the
    barrier, XLA treats the two inputs as different arrays. Other platforms need no barrier.
    """
    return jax.lax.platform_dependent(x, cuda=jax.lax.optimization_barrier, default=_identity)


def _identity(x: jax.Array) -> jax.Array:
    return x


@jax.custom_vjp
def expert_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Compute x [..., in] @ weight [in, out] in x's dtype. The gradient of the weight is summed in float32.

    The weight's gradient is a sum over all tokens on all devices. JAX's own gradient would round each device's sum to
    x's dtype, and add the rounded sums in that dtype. A bfloat16 sum loses small terms: a sum of ones stops at 256.
    """
    return unfused_on_gpu(x) @ weight.astype(x.dtype)


def _expert_product_forward(x: jax.Array, weight: jax.Array):
    return expert_product(x, weight), (x, weight)


def _expert_product_backward(residuals, gradient: jax.Array):
    x, weight = residuals
    x_gradient = gradient @ weight.astype(x.dtype).T
    weight_gradient = sum_over_tokens(x, gradient, gradient_is_narrow=weight.shape[0] > weight.shape[1])
    return x_gradient, weight_gradient.astype(weight.dtype)


expert_product.defvjp(_expert_product_forward, _expert_product_backward)


def sum_over_tokens(x: jax.Array, gradient: jax.Array, *, gradient_is_narrow: bool) -> jax.Array:
    """Compute Σ over all tokens of x ⊗ gradient: [..., in] and [..., out] -> [in, out] in float32.

    This is the product xᵀ gradient. XLA's CPU compiler writes a transposed copy of the first factor to memory, which is
    slow if that factor is the wider one. If `gradient` is narrower than x, the CPU program therefore computes
    (gradientᵀ x)ᵀ, which copies only `gradient`. A barrier keeps XLA from rewriting this to xᵀ gradient.

    Args:
        x: input of a product, [..., in].
        gradient: gradient of the product's output, [..., out].
        gradient_is_narrow: whether out < in.
    """
    tokens = tuple(range(x.ndim - 1))
    product = partial(
        jax.lax.dot_general, dimension_numbers=((tokens, tokens), ((), ())), preferred_element_type=jnp.float32
    )

    def transposed_product(x: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(product(gradient, x)).T

    if gradient_is_narrow:
        return jax.lax.platform_dependent(x, gradient, cpu=transposed_product, default=product)
    return product(x, gradient)
