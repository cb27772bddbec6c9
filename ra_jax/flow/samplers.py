"""Samplers: from noise to data along a velocity field."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def euler(velocity: Velocity, latents: jax.Array, times: jax.Array) -> jax.Array:
    """Integrate dx/dt = v(x, t) from times[0] to times[-1] by x' = x − (t − t')·v(x, t).

    velocity: (x [B, ...], t [B]) -> [B, ...]; latents [B, ...] at times[0]; times [steps + 1], decreasing. float32.
    """
    times = jnp.asarray(times, jnp.float32)

    def step(x, interval):
        t, t_next = interval
        return x - (t - t_next) * velocity(x, jnp.full(x.shape[:1], t)), None

    final, _ = jax.lax.scan(step, latents.astype(jnp.float32), (times[:-1], times[1:]))
    return final
