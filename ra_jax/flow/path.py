"""The straight path between data and noise (rectified flow, Liu et al. 2209.03003), with FLUX's direction of time.

    x_t = (1 − t)·x0 + t·ε        v* = dx_t/dt = ε − x0        t = 0 is data, t = 1 is noise

Arrays are [B, ...]. t is [B] and is broadcast over the trailing axes. Latents and noise are float32.
"""

import jax


def _expand(t: jax.Array, x: jax.Array) -> jax.Array:
    """Add axes to t [B], so that it broadcasts over the trailing axes of x [B, ...]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def interpolate(clean: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Compute x_t = (1 − t)·x0 + t·ε."""
    t = _expand(t, clean)
    return (1.0 - t) * clean + t * noise


def velocity_target(clean: jax.Array, noise: jax.Array) -> jax.Array:
    """Compute v* = ε − x0, which is the same for every t."""
    return noise - clean


def clean_from_velocity(noisy: jax.Array, velocity: jax.Array, t: jax.Array) -> jax.Array:
    """Compute x̂0 = x_t − t·v."""
    return noisy - _expand(t, noisy) * velocity


def noise_from_velocity(noisy: jax.Array, velocity: jax.Array, t: jax.Array) -> jax.Array:
    """Compute ε̂ = x_t + (1 − t)·v."""
    return noisy + (1.0 - _expand(t, noisy)) * velocity
