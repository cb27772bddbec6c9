"""The Euler sampler against diffusers' scheduler, and on fields whose answer is known."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ra_jax.flow.samplers import euler
from ra_jax.flow.schedule import FlowSchedule

NOISE = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)


def test_steps_are_those_of_diffusers():
    schedule, tokens, steps = FlowSchedule(), 3072, 7
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=schedule.mu(tokens))
    x = torch.from_numpy(NOISE)
    for timestep in scheduler.timesteps:
        x = scheduler.step(torch.sin(3 * x) + timestep / 1000 * x, timestep, x).prev_sample

    ours = euler(lambda x, t: jnp.sin(3 * x) + t[:, None, None] * x, NOISE, schedule.sampling_times(steps, tokens))
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-5, atol=1e-5)


def test_a_linear_field_gives_the_product_of_its_steps():
    times = np.array([1.0, 0.7, 0.65, 0.2, 0.0])
    rates = np.array([0.5, -2.0], np.float32)[:, None, None]
    ours = euler(lambda x, t: rates * x, NOISE, times)
    growth = np.prod([1 - (a - b) * rates for a, b in pairwise(times)], axis=0)
    np.testing.assert_allclose(ours, growth * NOISE, rtol=1e-5)


def test_the_field_of_one_clean_image_leads_to_it_in_any_steps():
    clean = np.random.default_rng(1).normal(size=NOISE.shape).astype(np.float32)
    for steps in (1, 9):
        times = FlowSchedule().sampling_times(steps, 256)
        ours = euler(lambda x, t: (x - clean) / t[:, None, None], NOISE, times)
        np.testing.assert_allclose(ours, clean, atol=1e-5)


def test_latents_of_half_precision_are_integrated_in_float32():
    ours = euler(lambda x, t: jnp.full_like(x, 1e-4), jnp.ones((1, 2), jnp.bfloat16), np.linspace(1, 0, 11))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, 1 - 1e-4, rtol=1e-6)
