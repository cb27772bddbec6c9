"""Rollouts: generate one sample for each condition, by the ODE or the SDE sampler, as pure functions of arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from ra_jax.flow.samplers import Velocity, sample_euler, sample_sde


@partial(jax.tree_util.register_dataclass, data_fields=["clean", "states", "times", "experts"], meta_fields=[])
@dataclass(frozen=True)
class Sample:
    """One result of each of B conditions, as input of the policy estimators.

    Attributes:
        clean: x0 [B, N, 4C].
        states: x [B, W + 1, N, 4C] before each of W noisy steps and after the last; None unless the SDE sampler
            generated the sample.
        times: t [W + 1] of the states; None if `states` is None.
        experts: index of the expert that was drawn for each result, [B] int32; None without `sample` routing.
    """

    clean: jax.Array
    states: jax.Array | None = None
    times: jax.Array | None = None
    experts: jax.Array | None = None


def diptych_noise(shared_keys: jax.Array, sample_keys: jax.Array, grid: tuple[int, int], features: int) -> jax.Array:
    """Draw noise ε ~ N(0, I) [B, N, features] over the tokens of a diptych.

    Args:
        shared_keys: [B], keys of the left panel's noise. All samples of a group share them.
        sample_keys: [B], keys of the right panel's noise, which differ between samples.
        grid: (rows, columns) of the N tokens.
        features: number of features of a token.
    """
    rows, columns = grid

    def draw_panel(keys: jax.Array) -> jax.Array:
        shape = (rows, columns // 2, features)
        return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)

    noise = jnp.concatenate([draw_panel(shared_keys), draw_panel(sample_keys)], axis=2)
    return noise.reshape(noise.shape[0], rows * columns, features)


def roll_out(
    velocity: Velocity,
    draw_noise: Callable[[jax.Array], jax.Array],
    times: jax.Array,
    noisy_steps: "NoisySteps | None",
) -> Sample:
    """Generate one sample for each condition.

    Args:
        velocity: (x [B, N, 4C], t [B]) -> [B, N, 4C].
        draw_noise: number of a draw -> ε [B, N, 4C]. Draw 0 is the initial noise. Draw 1 + i is the noise of
            step i.
        times: [steps + 1], decreasing.
        noisy_steps: the steps that add noise (SDE sampler); None for the ODE sampler.
    """
    if noisy_steps is None:
        return Sample(sample_euler(velocity, draw_noise(jnp.asarray(0)), times))
    first, count = noisy_steps.first, noisy_steps.count
    clean, states = sample_sde(
        velocity,
        draw_noise(jnp.asarray(0)),
        times,
        lambda step: draw_noise(1 + step),
        noise_level=noisy_steps.noise_level,
        first=first,
        count=count,
    )
    noisy_times = jax.lax.dynamic_slice_in_dim(jnp.asarray(times, jnp.float32), first, count + 1)
    return Sample(clean, states=jnp.moveaxis(states, 0, 1), times=noisy_times)


@dataclass(frozen=True)
class NoisySteps:
    """The steps of a rollout that add noise.

    Attributes:
        first: number of the first noisy step, a traced scalar.
        count: W, the number of noisy steps.
        noise_level: η.
    """

    first: jax.Array
    count: int
    noise_level: float
