"""How probable a policy finds a clean image: log_prob(params, cache) -> [B].

A flow model has no cheap likelihood. The `matching` estimator stands in for it with the (negative) flow-matching error
at a few shared time steps and noises, as FPO (2507.21053, eq. 9) and AWM do; it needs no trajectory, so an image that
people scored can be used. It is float32, deterministic in its cache and the same graph for θ and θ_old.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ra_jax.flow.path import interpolate
from ra_jax.flow.schedule import stratified_times
from ra_jax.rl.losses import flow_matching_error


@partial(jax.tree_util.register_dataclass, data_fields=["clean", "times", "noise", "region"], meta_fields=[])
@dataclass(frozen=True)
class MatchingCache:
    """What the old policy saw, and what the new one is shown again.

    clean: x0 [B, N, 4C]; times: [B, K]; noise: [B, K, N, 4C]; region: mean_Ω's weights [B, N, 4].
    """

    clean: jax.Array
    times: jax.Array
    noise: jax.Array
    region: jax.Array


def matching_cache(
    keys: jax.Array, clean: jax.Array, region: jax.Array, *, count: int, fraction: float
) -> MatchingCache:
    """Draw K = `count` pairs (t, ε) from each record's key [B]; records with equal keys (a group) share them."""

    def draw(key):
        time_key, noise_key = jax.random.split(key)
        times = stratified_times(time_key, count, fraction)
        return times, jax.random.normal(noise_key, (count, *clean.shape[1:]), jnp.float32)

    times, noise = jax.vmap(draw)(keys)
    return MatchingCache(clean, times, noise, region)


def matching_log_prob(
    velocity: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array],
    params: Any,
    cache: MatchingCache,
    *,
    temperature: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """ℓ = −(1/τ)·mean_k mean_Ω ‖v_θ(x_{t_k}) − (ε_k − x0)‖², and the velocities it took.

    velocity: (params, x [B·K, N, 4C], t [B·K], records [B·K]) -> [B·K, N, 4C], where records[i] is the row of the batch
    whose condition belongs to row i. Returns ℓ [B] float32 and v_θ [B·K, N, 4C].
    """
    b, k = cache.times.shape
    records = jnp.repeat(jnp.arange(b), k)
    clean = cache.clean[records]
    noise = cache.noise.reshape(b * k, *cache.noise.shape[2:])
    times = cache.times.reshape(b * k)
    predicted = velocity(params, interpolate(clean, noise, times), times, records)
    errors = flow_matching_error(predicted, clean, noise, cache.region[records])
    return -errors.reshape(b, k).mean(1) / temperature, predicted
