"""Means and sums over the global batch that are the same in every way a step is launched.

Under `jax.jit` the batch in a step *is* the global one and `all_mean` is a plain reduction; under a mapped axis it
reduces over its replicas too. Losses and metrics take every mean through here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ra_jax.parallel.partitioning import batch_shards, shard_batch


def map_microbatches(function: Callable[[jax.Array], jax.Array], x: jax.Array, size: int) -> jax.Array:
    """`function` over the rows of x [B, ...], at most `size` of each device's at once, one microbatch after another.

    Microbatches are of equal size: the largest that divides a device's rows.
    """
    shards = batch_shards()
    rows = x.shape[0] // shards
    size = max(n for n in range(1, min(size, rows) + 1) if rows % n == 0)
    if size == rows:
        return function(x)
    # [B] = [shards, turns, size] -> [turns, shards, size]: each turn takes rows of every shard.
    turns = shard_batch(x.reshape(shards, -1, size, *x.shape[1:]).swapaxes(0, 1), axis=1)
    out = jax.lax.map(lambda rows: function(rows.reshape(-1, *x.shape[1:])), turns)
    out = out.reshape(-1, shards, size, *out.shape[2:]).swapaxes(0, 1)
    return shard_batch(out.reshape(-1, *out.shape[3:]))


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
