"""Compares the Euler sampler with diffusers' scheduler, and both samplers with closed forms for Gaussian data."""

from importlib.util import find_spec
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.flow.samplers import diffusion_coefficient, sample_euler, sample_sde, sde_transition, window_starts
from ra_jax.flow.schedule import FlowSchedule

if find_spec("torch"):
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

NOISE = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)


@pytest.mark.torch
def test_euler_steps_match_diffusers():
    schedule, tokens, steps = FlowSchedule(), 3072, 7
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=schedule.mu(tokens))
    x = torch.from_numpy(NOISE)
    for timestep in scheduler.timesteps:
        x = scheduler.step(torch.sin(3 * x) + timestep / 1000 * x, timestep, x).prev_sample

    ours = sample_euler(
        lambda x, t: jnp.sin(3 * x) + t[:, None, None] * x, NOISE, schedule.sampling_times(steps, tokens)
    )
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-5, atol=1e-5)


def test_a_linear_velocity_scales_the_noise_by_the_product_of_its_steps():
    times = np.array([1.0, 0.7, 0.65, 0.2, 0.0])
    rates = np.array([0.5, -2.0], np.float32)[:, None, None]
    ours = sample_euler(lambda x, t: rates * x, NOISE, times)
    growth = np.prod([1 - (a - b) * rates for a, b in pairwise(times)], axis=0)
    np.testing.assert_allclose(ours, growth * NOISE, rtol=1e-5)


def test_the_velocity_toward_one_clean_image_reaches_it_in_any_number_of_steps():
    clean = np.random.default_rng(1).normal(size=NOISE.shape).astype(np.float32)
    for steps in (1, 9):
        times = FlowSchedule().sampling_times(steps, 256)
        ours = sample_euler(lambda x, t: (x - clean) / t[:, None, None], NOISE, times)
        np.testing.assert_allclose(ours, clean, atol=1e-5)


def test_bfloat16_latents_are_integrated_in_float32():
    ours = sample_euler(lambda x, t: jnp.full_like(x, 1e-4), jnp.ones((1, 2), jnp.bfloat16), np.linspace(1, 0, 11))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, 1 - 1e-4, rtol=1e-6)


# For data N(MEAN, SPREAD²·I), x_t is Gaussian, so that the optimal velocity E[ε − x0 | x_t] has a closed form.
# LEVEL is the noise level of stochastic steps.
MEAN, SPREAD, LEVEL = 0.8, 0.6, 0.7


def optimal_velocity(x, t):
    t = t.reshape(t.shape + (1,) * (x.ndim - 1))
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return (t - (1 - t) * SPREAD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def expected_moments(times, level, mean=0.0, variance=1.0):
    """Return mean and variance after all steps.

    A step is x' = a·x + b + std·z. The formula of the step's mean μ gives a and b.
    """
    for t, after in pairwise(np.asarray(times, np.float64)):
        g = level * np.sqrt(t / (1 - t)) if t <= 0.9 else 0.0

        def mu(x, t=t, after=after, g=g):
            v = optimal_velocity(np.asarray([x]), np.asarray([t]))[0]
            return x - (t - after) * (v + g**2 / (2 * t) * (x + (1 - t) * v))

        slope = mu(1.0) - mu(0.0)
        mean, variance = slope * mean + mu(0.0), slope**2 * variance + g**2 * (t - after)
    return mean, variance


def sample(times, level, start, *, noisy_steps=None, first=0):
    key = jax.random.key(3)

    def draw(step):
        return jax.random.normal(jax.random.fold_in(key, step), start.shape)

    run = jax.jit(
        lambda x: sample_sde(optimal_velocity, x, times, draw, noise_level=level, first=first, count=noisy_steps)
    )
    return run(start)


def assert_moments(samples, mean, variance):
    """Check that mean and variance of Gaussian samples are within four standard errors of the expected values."""
    n = samples.size
    assert abs(np.mean(samples) - mean) < 4 * np.sqrt(variance / n)
    assert abs(np.var(samples) - variance) < 4 * variance * np.sqrt(2 / n)


def test_eight_stochastic_steps_have_the_moments_of_the_discrete_recursion():
    times = FlowSchedule().sampling_times(8, 2048)
    start = jax.random.normal(jax.random.key(1), (100_000, 1))
    final, _ = sample(times, LEVEL, start)
    mean, variance = expected_moments(times, LEVEL)
    assert_moments(np.asarray(final, np.float64), mean, variance)
    # The variance differs from that of the ODE by more than the tolerance above.
    ode_mean, ode_variance = expected_moments(times, 0.0)
    assert abs(ode_variance - variance) > 20 * variance * np.sqrt(2 / final.size)
    assert_moments(np.asarray(sample_euler(optimal_velocity, start, times), np.float64), ode_mean, ode_variance)


def test_many_stochastic_steps_keep_the_marginals():
    """Sampling starts at t = 0.9, where g is finite. After 200 steps the moments are within 2 % of the data's."""
    entry = 0.9
    spread = np.sqrt((1 - entry) ** 2 * SPREAD**2 + entry**2)
    start = (1 - entry) * MEAN + spread * jax.random.normal(jax.random.key(2), (100_000, 1))
    final, _ = sample(np.linspace(entry, 0.0, 201), LEVEL, start)
    assert abs(float(final.mean()) / MEAN - 1) < 0.02
    assert abs(float(final.std()) / SPREAD - 1) < 0.02


def test_noise_is_added_only_in_the_window_and_the_states_of_the_window_are_returned():
    times = FlowSchedule().sampling_times(8, 2048)
    start = jax.random.normal(jax.random.key(1), (4, 3))
    without_noise, _ = sample(times, 0.0, start)
    final, states = sample(times, LEVEL, start, noisy_steps=2, first=3)
    assert states.shape == (3, 4, 3)
    np.testing.assert_allclose(without_noise, sample_euler(optimal_velocity, start, times), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(states[0], sample_euler(optimal_velocity, start, times[:4]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(final, sample_euler(optimal_velocity, states[2], times[5:]), rtol=1e-5, atol=1e-6)
    assert np.abs(final - without_noise).max() > 0.01
    for before, after, step in ((states[0], states[1], 3), (states[1], states[2], 4)):
        t, t_next = (jnp.full(4, times[step + i]) for i in (0, 1))
        mean, std = sde_transition(before, optimal_velocity(before, t), t, t_next, LEVEL)
        z = (after - mean) / std[:, None]
        np.testing.assert_allclose(z, jax.random.normal(jax.random.fold_in(jax.random.key(3), step), (4, 3)), atol=1e-4)


def test_the_diffusion_coefficient_is_zero_above_a_time_of_0_9():
    t = jnp.asarray([0.1, 0.5, 0.9, 0.91, 1.0])
    np.testing.assert_allclose(diffusion_coefficient(t, 0.7), [0.7 / 3, 0.7, 2.1, 0.0, 0.0], rtol=1e-5)


def test_windows_start_after_step_0_in_the_noisier_half_at_times_up_to_0_9():
    times = FlowSchedule().sampling_times(8, 2048)
    assert window_starts(times, 2).tolist() == [2, 3]
    assert times[1] > 0.9 >= times[2]
    assert window_starts(np.linspace(0.9, 0, 9), 3).tolist() == [1, 2, 3]
    assert window_starts(FlowSchedule().sampling_times(2, 2048), 2).tolist() == []
