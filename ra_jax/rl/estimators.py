"""How probable a policy finds what was generated or scored: log_prob(params, cache) -> [B], float32.

A flow model has no cheap likelihood. Two estimators of a policy ratio, each deterministic in its cache and the same
graph for θ and θ_old:

    matching  minus the flow-matching error at a few shared times and noises (FPO, 2507.21053, eq. 9; AWM): it needs no
              trajectory, so that an image that people scored can be used
    sde       the probability of the stochastic sampler's steps (Flow-GRPO, 2505.05470, eq. 13): generated images only

`nft` (DiffusionNFT, 2509.16117) has no ratio: it contrasts the velocities of θ and θ_old at matching's times.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ra_jax.flow.path import interpolate
from ra_jax.flow.regions import region_mean
from ra_jax.flow.samplers import sde_transition
from ra_jax.flow.schedule import stratified_times
from ra_jax.rl.losses import flow_matching_error

# (params, x [B·K, N, 4C], t [B·K]) -> [B·K, N, 4C]: K rows of the first record's condition, then K of the second's, …
PolicyVelocity = Callable[[Any, jax.Array, jax.Array], jax.Array]


def repeat(x: jax.Array, count: int) -> jax.Array:
    """Every row `count` times in a row: [B, ...] -> [B·count, ...]."""
    # Not by indices: a gather over rows that are spread over devices would bring all of them to every device.
    return jnp.broadcast_to(x[:, None], (len(x), count, *x.shape[1:])).reshape(-1, *x.shape[1:])


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

    @property
    def points(self) -> int:
        """K: velocities are compared at so many points a record."""
        return self.times.shape[1]

    def rows(self) -> tuple[jax.Array, jax.Array]:
        """(x_t [B·K, N, 4C], t [B·K]): the points at which velocities are compared."""
        times = self.times.reshape(-1)
        return interpolate(repeat(self.clean, self.points), self.flat_noise(), times), times

    def errors(self, predicted: jax.Array) -> jax.Array:
        """mean_Ω ‖v − (ε_k − x0)‖² of velocities [B·K, N, 4C] at these points, [B, K]."""
        clean, region = repeat(self.clean, self.points), repeat(self.region, self.points)
        return flow_matching_error(predicted, clean, self.flat_noise(), region).reshape(self.times.shape)

    def flat_noise(self) -> jax.Array:
        """The noise of every point, [B·K, N, 4C]."""
        return self.noise.reshape(-1, *self.noise.shape[2:])


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
    velocity: PolicyVelocity, params: Any, cache: MatchingCache, *, temperature: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """ℓ [B] = −(1/τ)·mean_k mean_Ω ‖v_θ(x_{t_k}) − (ε_k − x0)‖², and the velocities it took [B·K, N, 4C]."""
    predicted = velocity(params, *cache.rows())
    return -cache.errors(predicted).mean(1) / temperature, predicted


@partial(jax.tree_util.register_dataclass, data_fields=["states", "times", "region"], meta_fields=["noise_level"])
@dataclass(frozen=True)
class TransitionCache:
    """Steps of the stochastic sampler that were taken.

    states: [B, W + 1, N, 4C], before each of W steps and after the last; times: [W + 1], decreasing, g > 0 at the first
    W of them; region: mean_Ω's weights [B, N, 4]; noise_level: η.
    """

    states: jax.Array
    times: jax.Array
    region: jax.Array
    noise_level: float

    @property
    def points(self) -> int:
        """W: velocities are compared at so many points a record."""
        return self.states.shape[1] - 1

    def rows(self) -> tuple[jax.Array, jax.Array]:
        """(x [B·W, N, 4C], t [B·W]): the states that the steps began at."""
        states = self.states[:, :-1].reshape(-1, *self.states.shape[2:])
        return states, jnp.tile(self.times[:-1], len(self.states))


def sde_log_prob(
    velocity: PolicyVelocity, params: Any, cache: TransitionCache
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """ℓ [B] = mean over steps and Ω of log N(x'; μ_θ(x), std²), by element.

    Returns ℓ, the means μ_θ [B·W, N, 4C], the standard deviations [B·W], and the velocities [B·W, N, 4C].
    """
    x, t = cache.rows()
    predicted = velocity(params, x, t)
    mean, std = sde_transition(x, predicted, t, jnp.tile(cache.times[1:], len(cache.states)), cache.noise_level)
    after = cache.states[:, 1:].reshape(x.shape)
    square = region_mean((after - mean) ** 2, repeat(cache.region, cache.points))
    log_density = -0.5 * square / std**2 - jnp.log(std) - 0.5 * jnp.log(2.0 * jnp.pi)
    return log_density.reshape(-1, cache.points).mean(1), mean, std, predicted


def normalized_log_ratio(
    log_ratio: jax.Array, mean: jax.Array, old_mean: jax.Array, std: jax.Array, region: jax.Array
) -> jax.Array:
    """log ρ̂ [B], which has neither the bias nor the tiny spread of a mean log-ratio ℓ_θ − ℓ_old over D elements.

        log ρ̂ = √D·(ℓ_θ − ℓ_old + ½·mean ‖(μ_θ − μ_old)/std‖²)        D = (elements that mean_Ω counts) · W

    The mean log-ratio of a step is mean(z·δ) − ½·mean δ² with δ = Δμ/std and z ~ N(0, I): a bias of −r²/2 against a
    spread of r/√D (r² = mean δ²), so that nearly every ratio falls below 1 and is clipped on that side. Without its
    bias (GRPO-Guard, 2510.22319, RatioNorm) and times √D it has mean 0 and spread r, whatever the size of the image.

    log_ratio: [B]; mean, old_mean: [B·W, N, 4C]; std: [B·W]; region: [B, N, 4].
    """
    b = log_ratio.shape[0]
    w = mean.shape[0] // b
    square = region_mean((mean - jax.lax.stop_gradient(old_mean)) ** 2, repeat(region, w)) / std**2
    channels = mean.shape[-1] // 4
    elements = w * channels / (region**2).sum((1, 2))
    return jnp.sqrt(elements) * (log_ratio + 0.5 * square.reshape(b, w).mean(1))
