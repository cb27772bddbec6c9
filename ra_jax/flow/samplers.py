"""Samplers that integrate a velocity field from noise to data, as an ODE or as an SDE.

At every t, samples of the SDE have the same distribution as samples of the ODE (Flow-GRPO, Liu et al. 2505.05470,
eq. 12). Each step of the SDE adds noise, and a drift along the score compensates for the noise. The steps are Gaussian,
so each step has a log-probability.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.flow.path import noise_from_velocity

Velocity = Callable[[jax.Array, jax.Array], jax.Array]

MAX_NOISY_TIME = 0.9  # above this t, steps add no noise, because g = η·√(t/(1 − t)) is infinite at t = 1


def sample_euler(velocity: Velocity, latents: jax.Array, times: jax.Array) -> jax.Array:
    """Integrate dx/dt = v(x, t) from times[0] to times[-1] in Euler steps x' = x − (t − t')·v(x, t), in float32.

    Args:
        velocity: (x [B, ...], t [B]) -> [B, ...].
        latents: [B, ...] at times[0].
        times: [steps + 1], decreasing.

    Returns:
        [B, ...] at times[-1].
    """
    times = jnp.asarray(times, jnp.float32)

    def step(x, interval):
        t, t_next = interval
        return x - (t - t_next) * velocity(x, jnp.full(x.shape[:1], t)), None

    final, _ = jax.lax.scan(step, latents.astype(jnp.float32), (times[:-1], times[1:]))
    return final


def diffusion_coefficient(t: jax.Array, noise_level: float) -> jax.Array:
    """Compute g(t) = η·√(t/(1 − t)) with η = `noise_level`; 0 above t = 0.9."""
    return jnp.where(t > MAX_NOISY_TIME, 0.0, noise_level * jnp.sqrt(t / jnp.maximum(1.0 - t, 1.0 - MAX_NOISY_TIME)))


def sde_transition(
    x: jax.Array, velocity: jax.Array, t: jax.Array, t_next: jax.Array, noise_level: float
) -> tuple[jax.Array, jax.Array]:
    """Compute mean [B, ...] and standard deviation [B] of the SDE's step from t [B] to t' [B], with t' < t.

    μ = x − Δ·[v + g²/(2t)·(x + (1 − t)·v)]        std = g·√Δ        Δ = t − t'
    """
    g, delta = diffusion_coefficient(t, noise_level), t - t_next
    shape = t.shape + (1,) * (x.ndim - t.ndim)  # broadcasts [B] over the trailing axes of x
    drift = velocity + (g**2 / (2.0 * t)).reshape(shape) * noise_from_velocity(x, velocity, t)
    return x - delta.reshape(shape) * drift, g * jnp.sqrt(delta)


def sample_sde(
    velocity: Velocity,
    latents: jax.Array,
    times: jax.Array,
    draw_noise: Callable[[jax.Array], jax.Array],
    *,
    noise_level: float,
    first: jax.Array | int = 0,
    count: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Integrate the SDE from times[0] to times[-1] in Euler–Maruyama steps.

    `count` steps add noise, beginning with step `first`. The other steps are steps of the ODE. By default all steps add
    noise.

    Args:
        velocity: (x [B, ...], t [B]) -> [B, ...].
        latents: [B, ...] at times[0].
        times: [steps + 1], decreasing.
        draw_noise: index of a step -> z ~ N(0, I) [B, ...].
        noise_level: η of `diffusion_coefficient`.
        first: index of the first noisy step.
        count: number of noisy steps; None: all steps.

    Returns:
        the final x [B, ...].
        the states [count + 1, B, ...]: x before each noisy step, and x after the last noisy step.
    """
    times = jnp.asarray(times, jnp.float32)
    steps = len(times) - 1
    count = steps if count is None else count

    def step(x, index):
        t, t_next = (jnp.full(x.shape[:1], times[index + offset]) for offset in (0, 1))
        level = jnp.where((index >= first) & (index < first + count), noise_level, 0.0)
        mean, std = sde_transition(x, velocity(x, t), t, t_next, level)
        return mean + std.reshape(std.shape + (1,) * (x.ndim - 1)) * draw_noise(index), x

    final, states = jax.lax.scan(step, latents.astype(jnp.float32), jnp.arange(steps))
    states = jnp.concatenate([states, final[None]])
    return final, jax.lax.dynamic_slice_in_dim(states, first, count + 1)


def window_starts(times: np.ndarray, count: int) -> np.ndarray:
    """Return the steps at which a window of `count` noisy steps may begin.

    They are the steps after step 0, in the first (noisier) half of the sampler, at which g > 0. The result may be empty
    if the sampler has few steps.

    Args:
        times: [steps + 1], decreasing.
        count: number of noisy steps.
    """
    steps = len(times) - 1
    starts = np.arange(1, steps - count + 1)
    return starts[(starts < steps / 2) & (times[starts] <= MAX_NOISY_TIME)]
