"""The straight path between data and noise."""

import jax
import numpy as np
import pytest

from ra_jax.flow.path import clean_from_velocity, interpolate, noise_from_velocity, velocity_target


@pytest.fixture
def pair():
    clean, noise = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)
    return clean, noise


def test_the_path_runs_from_data_to_noise_at_the_target_velocity(pair):
    clean, noise = pair
    t = np.array([0.0, 1.0, 0.25], np.float32)
    x, speed = jax.jvp(lambda t: interpolate(clean, noise, t), (t,), (np.ones_like(t),))
    np.testing.assert_allclose(x[0], clean[0], atol=1e-6)
    np.testing.assert_allclose(x[1], noise[1], atol=1e-6)
    np.testing.assert_allclose(x[2], 0.75 * clean[2] + 0.25 * noise[2], atol=1e-6)
    np.testing.assert_allclose(speed, velocity_target(clean, noise), atol=1e-6)


def test_clean_and_noise_follow_from_the_velocity(pair):
    clean, noise = pair
    t = np.array([0.1, 0.5, 1.0], np.float32)
    x, velocity = interpolate(clean, noise, t), velocity_target(clean, noise)
    np.testing.assert_allclose(clean_from_velocity(x, velocity, t), clean, atol=1e-6)
    np.testing.assert_allclose(noise_from_velocity(x, velocity, t), noise, atol=1e-6)
