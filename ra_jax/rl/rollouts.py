"""Rollouts: generating a group of candidates for each condition, as pure functions of arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from ra_jax.flow.samplers import Velocity, sample_euler, sample_sde


@partial(jax.tree_util.register_dataclass, data_fields=["clean", "states", "times", "experts"], meta_fields=[])
@dataclass(frozen=True)
class Sample:
    """One result of each of B conditions, as the policy judges it.

    clean: x0 [B, N, 4C]. Where the stochastic sampler made it: states [B, W + 1, N, 4C] and times [W + 1] of its noisy
    steps. With `sample` routing: experts [B] int32, the one that was drawn. Else None.
    """

    clean: jax.Array
    states: jax.Array | None = None
    times: jax.Array | None = None
    experts: jax.Array | None = None


def panel_noise(group_keys: jax.Array, sample_keys: jax.Array, grid: tuple[int, int], features: int) -> jax.Array:
    """ε ~ N(0, I) [B, N, features] over a diptych's tokens: the left panel's from the group's key, which all members
    share, the right panel's from the member's own. Keys: [B]; grid: (rows, columns) of the N tokens.
    """
    rows, columns = grid

    def draw(keys: jax.Array) -> jax.Array:
        shape = (rows, columns // 2, features)
        return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)

    noise = jnp.concatenate([draw(group_keys), draw(sample_keys)], axis=2)
    return noise.reshape(noise.shape[0], rows * columns, features)


def roll_out(
    velocity: Velocity, noise: Callable[[jax.Array], jax.Array], times: jax.Array, noisy_steps: "NoisySteps | None"
) -> Sample:
    """One member of each group, by the ODE, or by the SDE where `stochastic_steps` says which steps are noisy.

    velocity: (x [B, N, 4C], t [B]) -> [B, N, 4C]; noise: number -> ε [B, N, 4C], 0 the initial one, 1 + i step i's.
    """
    if noisy_steps is None:
        return Sample(sample_euler(velocity, noise(jnp.asarray(0)), times))
    first, count = noisy_steps.first, noisy_steps.count
    clean, states = sample_sde(
        velocity,
        noise(jnp.asarray(0)),
        times,
        lambda step: noise(1 + step),
        noise_level=noisy_steps.noise_level,
        first=first,
        count=count,
    )
    window = jax.lax.dynamic_slice_in_dim(jnp.asarray(times, jnp.float32), first, count + 1)
    return Sample(clean, states=jnp.moveaxis(states, 0, 1), times=window)


@dataclass(frozen=True)
class NoisySteps:
    """Which steps of a rollout add noise: `count` from step `first` on (traced), with noise level η."""

    first: jax.Array
    count: int
    noise_level: float
