"""Tests the noise that samples of a group share, and the states that samplers return for the policy loss."""

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.flow.samplers import sample_euler
from ra_jax.rl.rollouts import NoisySteps, diptych_noise, roll_out

GRID, FEATURES = (4, 6), 5
TIMES = np.linspace(0.85, 0.0, 7, dtype=np.float32)


def random_keys(*seeds):
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def test_noise_is_shared_on_the_left_panel_and_independent_on_the_right_panel():
    first = np.asarray(diptych_noise(random_keys(0, 1), random_keys(2, 3), GRID, FEATURES)).reshape(2, *GRID, FEATURES)
    other_noise = np.asarray(diptych_noise(random_keys(0, 1), random_keys(4, 3), GRID, FEATURES)).reshape(
        2, *GRID, FEATURES
    )
    half = GRID[1] // 2
    np.testing.assert_array_equal(first[:, :, :half], other_noise[:, :, :half])
    np.testing.assert_array_equal(first[1], other_noise[1])
    assert not np.any(first[0, :, half:] == other_noise[0, :, half:])
    assert not np.any(first[0] == first[1])


def test_noise_is_standard_normal():
    noise = np.asarray(diptych_noise(random_keys(*range(200)), random_keys(*range(200, 400)), GRID, FEATURES))
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size) and abs(noise.std() - 1) < 0.02


def velocity(x, t):
    return x * t[:, None, None]


def draw_noise(step):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (2, 24, FEATURES))


def test_a_rollout_without_noisy_steps_equals_the_euler_sampler():
    sample = roll_out(velocity, draw_noise, TIMES, None)
    np.testing.assert_allclose(sample.clean, sample_euler(velocity, draw_noise(0), TIMES), rtol=1e-6)
    assert sample.states is None and sample.times is None


def test_a_rollout_with_noisy_steps_returns_their_states_and_times():
    """The first noisy step is a traced value, tested for two steps. Each noisy step has different noise."""

    def run(first):
        return roll_out(velocity, draw_noise, TIMES, NoisySteps(first, count=2, noise_level=0.7))

    for first in (1, 2):
        sample = jax.jit(run)(jnp.asarray(first))
        assert sample.states.shape == (2, 3, 24, FEATURES)
        np.testing.assert_allclose(sample.times, TIMES[first : first + 3])
        np.testing.assert_allclose(
            sample.states[:, 0], sample_euler(velocity, draw_noise(0), TIMES[: first + 1]), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            sample.clean, sample_euler(velocity, sample.states[:, 2], TIMES[first + 2 :]), rtol=1e-5, atol=1e-6
        )
        t, t_next = TIMES[first], TIMES[first + 1]
        g = 0.7 * np.sqrt(t / (1 - t))
        x = np.asarray(sample.states[:, 0])
        mean = x - (t - t_next) * (x * t + g**2 / (2 * t) * (x + (1 - t) * x * t))
        z = (np.asarray(sample.states[:, 1]) - mean) / (g * np.sqrt(t - t_next))
        np.testing.assert_allclose(z, draw_noise(1 + first), atol=1e-4)
