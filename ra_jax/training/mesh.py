"""Means and sums over the global batch, the same in every way a step is launched.

Under `jax.jit` the batch in a step *is* the global one and these are plain reductions; under a mapped axis they reduce
over its replicas too. Losses and metrics take every mean through here.
"""

import jax
import jax.numpy as jnp


def local_conditions(conditions: int, generations: int, replicas: int) -> int:
    """Conditions of each replica: a group of rollouts lies within one, so that conditions are what is shared out.

    Raises ValueError where they cannot be shared out evenly.
    """
    if conditions % replicas:
        above = -(-conditions // replicas) * replicas
        raise ValueError(
            f"train_batch_size = {conditions}: {conditions} conditions of {generations} rollouts cannot be shared "
            f"evenly by {replicas} replicas, and a group is not divided; give --train_batch_size {above}, or another "
            f"multiple of {replicas}"
        )
    return conditions // replicas


def all_sum(x: jax.Array, axis_name: str | None = None) -> jax.Array:
    """The sum of a per-replica value over the replicas; the identity without a mapped axis."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def all_mean(x: jax.Array, axis_name: str | None = None, weights: jax.Array | None = None) -> jax.Array:
    """Σ w·x / Σ w over the first axis and all replicas; `weights` [B] default to 1. Returns x's trailing shape."""
    weights = jnp.ones(x.shape[:1], jnp.float32) if weights is None else weights
    total = all_sum(jnp.tensordot(weights, x.astype(jnp.float32), 1), axis_name)
    return total / all_sum(weights.sum(), axis_name)


def mean_gradients(gradient: jax.Array, axis_name: str | None = None) -> jax.Array:
    """The gradient of a loss made of `all_mean`s, from every replica's own.

    A mean rather than a sum: the transpose of `psum` is `psum`, so that each replica's gradient is already that of the
    sum of all replicas' (equal) losses.
    """
    return gradient if axis_name is None else jax.lax.pmean(gradient, axis_name)
