"""Means and sums over the global batch, with the same result under `jax.jit` and under `jax.pmap`.

Under `jax.jit` the batch of a step is the global batch, and `all_mean` reduces over its first axis. Under `jax.pmap` a
replica has a part of the global batch, and `all_mean` also reduces over the mapped axis of replicas. All means in
losses and metrics are computed by these functions.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ra_jax.parallel.partitioning import batch_shards, shard_batch


def map_microbatches(function: Callable[[jax.Array], jax.Array], x: jax.Array, size: int) -> jax.Array:
    """Apply `function` to x [B, ...] in microbatches of at most `size` rows per device, one after another.

    All microbatches have the same size: the largest one that divides the number of rows on a device. If the devices do
    not divide the rows evenly, as in measurements of single scenes, every device has all rows.
    """
    shards = batch_shards() if x.shape[0] % batch_shards() == 0 else 1
    rows = x.shape[0] // shards
    size = max(n for n in range(1, min(size, rows) + 1) if rows % n == 0)
    if size == rows:
        return function(x)
    # [B] = [shards, microbatches, size] -> [microbatches, shards, size]: every microbatch has rows of every shard.
    microbatches = shard_batch(x.reshape(shards, -1, size, *x.shape[1:]).swapaxes(0, 1), axis=1)
    out = jax.lax.map(lambda rows: function(rows.reshape(-1, *x.shape[1:])), microbatches)
    out = out.reshape(-1, shards, size, *out.shape[2:]).swapaxes(0, 1)
    return shard_batch(out.reshape(-1, *out.shape[3:]))


def all_sum(x: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Sum a per-replica value over all replicas; without a mapped axis, return it unchanged."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def all_mean(x: jax.Array, axis_name: str | None = None, weights: jax.Array | None = None) -> jax.Array:
    """Compute the mean Σ w·x / Σ w over the first axis of x [B, ...] and over all replicas, float32 [...].

    The weights w [B] default to 1.
    """
    weights = jnp.ones(x.shape[:1], jnp.float32) if weights is None else weights
    total = all_sum(jnp.tensordot(weights, x.astype(jnp.float32), 1), axis_name)
    return total / all_sum(weights.sum(), axis_name)


def mean_gradients(gradient: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Compute the gradient of a loss of `all_mean` terms: the mean of the replicas' gradients.

    It is the mean and not the sum, because the transpose of `psum` is `psum`. Each replica has already computed the
    gradient of the sum of all replicas' losses, and these losses are equal.
    """
    return gradient if axis_name is None else jax.lax.pmean(gradient, axis_name)
