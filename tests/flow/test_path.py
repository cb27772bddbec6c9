"""The straight path between data and noise."""

import jax
import numpy as np

from ra_jax.flow.path import clean_from_velocity, interpolate, noise_from_velocity, velocity_target

CLEAN, NOISE = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)


def test_the_path_goes_from_clean_to_noise_with_the_target_velocity():
    t = np.array([0.0, 1.0, 0.25], np.float32)
    x, derivative = jax.jvp(lambda t: interpolate(CLEAN, NOISE, t), (t,), (np.ones_like(t),))
    np.testing.assert_allclose(x[0], CLEAN[0], atol=1e-6)
    np.testing.assert_allclose(x[1], NOISE[1], atol=1e-6)
    np.testing.assert_allclose(x[2], 0.75 * CLEAN[2] + 0.25 * NOISE[2], atol=1e-6)
    np.testing.assert_allclose(derivative, velocity_target(CLEAN, NOISE), atol=1e-6)


def test_clean_and_noise_are_recovered_from_the_velocity():
    t = np.array([0.1, 0.5, 1.0], np.float32)
    x, velocity = interpolate(CLEAN, NOISE, t), velocity_target(CLEAN, NOISE)
    np.testing.assert_allclose(clean_from_velocity(x, velocity, t), CLEAN, atol=1e-6)
    np.testing.assert_allclose(noise_from_velocity(x, velocity, t), NOISE, atol=1e-6)
