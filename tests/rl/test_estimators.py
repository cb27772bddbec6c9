"""Compares estimators with loops and closed forms; tests the draws that a group shares and the ratio of a network."""

from functools import cache, partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.models.conditioning import Condition
from ra_jax.models.lora import Adapter
from ra_jax.rl.estimators import (
    MatchingCache,
    TransitionCache,
    map_timesteps,
    matching_cache,
    matching_log_prob,
    normalized_log_ratio,
    repeat_rows,
    sde_log_prob,
)

if find_spec("torch"):
    import torch

TEMPERATURE = 0.1


def random_keys(*seeds):
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def make_cache(keys, tokens=6, features=8, count=3, fraction=0.7) -> MatchingCache:
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(len(keys), tokens, features)).astype(np.float32)
    region = rng.uniform(size=(len(keys), tokens, 4)).astype(np.float32)
    region /= region.sum((1, 2), keepdims=True)
    return jax.jit(partial(matching_cache, count=count, fraction=fraction))(keys, clean, region)


def test_log_prob_is_minus_the_mean_error_divided_by_the_temperature():
    keys = random_keys(0, 1)
    cache = make_cache(keys)
    bias = np.random.default_rng(1).normal(size=(2, 6, 8)).astype(np.float32)

    def velocity(scale, x, t):
        return scale * jnp.tanh(x) * t[:, None, None] + repeat_rows(jnp.asarray(bias), 3)

    log_prob, predicted = jax.jit(partial(matching_log_prob, velocity, temperature=TEMPERATURE))(0.7, cache)
    clean, times, noise, region = (
        np.asarray(x, np.float64) for x in (cache.clean, cache.times, cache.noise, cache.region)
    )
    for record in range(2):
        errors = []
        for k in range(3):
            t, eps, x0 = times[record, k], noise[record, k], clean[record]
            v = 0.7 * np.tanh((1 - t) * x0 + t * eps) * t + bias[record]
            np.testing.assert_allclose(predicted[3 * record + k], v, rtol=1e-4, atol=1e-5)
            squared = (v - (eps - x0)) ** 2
            cells = squared.reshape(6, 2, 4).mean(1)  # over the two channels
            errors.append((cells * region[record]).sum())
        assert float(log_prob[record]) == pytest.approx(-np.mean(errors) / TEMPERATURE, rel=1e-5)
    assert log_prob.dtype == jnp.float32


def test_samples_of_a_group_share_times_and_noise_at_any_position_in_the_batch():
    cache, reordered = make_cache(random_keys(5, 7, 5)), make_cache(random_keys(7, 5))
    assert not np.array_equal(cache.clean[0], cache.clean[2])
    for draws in (cache.times, cache.noise):
        np.testing.assert_array_equal(draws[0], draws[2])
        assert not np.array_equal(draws[0], draws[1])
    np.testing.assert_array_equal(cache.times[:2], reordered.times[::-1])
    np.testing.assert_array_equal(cache.noise[:2], reordered.noise[::-1])


def test_equal_keys_give_equal_caches():
    first, again = make_cache(random_keys(3)), make_cache(random_keys(3))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first.times.shape == (1, 3)
    assert first.noise.shape == (1, 3, 6, 8)


def test_times_lie_in_the_noisiest_fraction_and_noise_is_standard_normal():
    cache = make_cache(random_keys(*range(64)), tokens=32, count=4)
    times, noise = np.asarray(cache.times), np.asarray(cache.noise)
    assert 0.3 <= times.min() < 0.31 and 0.99 < times.max() <= 1.0
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 0.01
    flat = noise.reshape(64 * 4, -1)
    correlation = flat @ flat.T / flat.shape[1] - np.eye(len(flat))
    assert np.abs(correlation).max() < 0.4  # the noise of every pair (record, k) is independent


def make_transitions(steps=2, samples=2, tokens=6, features=8) -> TransitionCache:
    rng = np.random.default_rng(2)
    states = rng.normal(size=(samples, steps + 1, tokens, features)).astype(np.float32)
    region = rng.uniform(size=(samples, tokens, 4)).astype(np.float32)
    region[:, :2] = 0.0  # two tokens outside Ω
    region /= region.sum((1, 2), keepdims=True)
    states, region = jnp.asarray(states), jnp.asarray(region)
    return TransitionCache(states, jnp.linspace(0.8, 0.4, steps + 1), region, noise_level=0.7)


def scaled_tanh(scale, x, t):
    return scale * jnp.tanh(x) + 0.1 * repeat_rows(jnp.arange(2), len(x) // 2)[:, None, None]


@pytest.mark.torch
def test_sde_log_prob_is_the_mean_log_density_of_the_sampled_steps():
    """Compares with torch's Normal at each element, with the sampler's μ and std, averaged over Ω and steps."""
    cache = make_transitions()
    log_prob, mean, std, predicted = jax.jit(partial(sde_log_prob, scaled_tanh))(0.7, cache)
    times, states = (np.asarray(x, np.float64) for x in (cache.times, cache.states))
    for b in range(2):
        densities = []
        for w in range(2):
            x, t, delta = states[b, w], times[w], times[w] - times[w + 1]
            v = 0.7 * np.tanh(x) + 0.1 * b
            g = 0.7 * np.sqrt(t / (1 - t))
            mu = x - delta * (v + g**2 / (2 * t) * (x + (1 - t) * v))
            np.testing.assert_allclose(mean[2 * b + w], mu, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(predicted[2 * b + w], v, rtol=1e-4, atol=1e-5)
            assert float(std[2 * b + w]) == pytest.approx(g * np.sqrt(delta), rel=1e-5)
            density = torch.distributions.Normal(torch.from_numpy(mu), g * np.sqrt(delta))
            by_element = density.log_prob(torch.from_numpy(states[b, w + 1])).numpy()
            densities.append((by_element.reshape(6, 2, 4).mean(1) * np.asarray(cache.region[b])).sum())
        assert float(log_prob[b]) == pytest.approx(np.mean(densities), rel=1e-5)


def test_normalized_ratio_has_mean_0_and_a_std_independent_of_size():
    """Compares with the formula log ρ̂ = √D·mean(z·δ), and checks mean and std over 4000 samples.

    For steps sampled from the old policy, the log-ratio has mean −r²/2 and std r/√D. The normalized log-ratio has mean
    0 and std r.
    """
    samples, tokens, features, delta, std = 4000, 16, 8, 0.3, 0.5
    rng = np.random.default_rng(0)
    old = rng.normal(size=(samples, tokens, features)).astype(np.float32)
    z = rng.normal(size=old.shape).astype(np.float32)
    new, after = old + delta * std, old + std * z
    region = np.full((samples, tokens, 4), 1 / (4 * tokens), np.float32)
    stds = np.full(samples, std, np.float32)

    def log_prob(mean):
        return (-0.5 * ((after - mean) / std) ** 2).mean((1, 2))

    plain = log_prob(new) - log_prob(old)
    ratio = normalized_log_ratio(plain, new, old, stds, region)
    count = tokens * features
    np.testing.assert_allclose(ratio, np.sqrt(count) * (z * delta).mean((1, 2)), atol=2e-4)
    assert abs(plain.mean() + delta**2 / 2) < 0.003 and abs(plain.std() - delta / np.sqrt(count)) < 0.002
    assert abs(ratio.mean()) < 4 * delta / np.sqrt(samples) and abs(ratio.std() / delta - 1) < 0.05


def test_normalized_ratio_scales_the_gradient_at_the_old_policy():
    """At μ = μ_old the gradient is √D times that of ℓ, because the bias correction has no gradient there."""
    cache = make_transitions()
    elements = 2 * 2 / (cache.region**2).sum((1, 2))  # channels · steps / Σ w²
    assert np.ptp(elements) > 0

    def each(scale):
        value, mean, std, _ = sde_log_prob(scaled_tanh, scale, cache)
        return value, normalized_log_ratio(value - jax.lax.stop_gradient(value), mean, mean, std, cache.region)

    plain, normalized = jax.jacobian(each)(0.7)
    np.testing.assert_allclose(normalized, np.sqrt(elements) * plain, rtol=1e-4)


class Policy:
    """Log-probability ℓ of a FLUX model with experts and router, for two records of one group and one of another."""

    GRID = (4, 8)

    def __init__(self, loaded, estimator="matching"):
        self.estimator = estimator
        rng = np.random.default_rng(0)
        model, tokens = loaded.model, self.GRID[0] * self.GRID[1]

        def normal(*shape):
            return rng.normal(size=shape).astype(np.float32)

        mask_part = (rng.uniform(size=(3, tokens, 64)) > 0.7).astype(np.float32)
        fill = np.concatenate([normal(3, tokens, 16), mask_part], axis=-1)
        self.model, self.frozen = model, loaded.frozen
        self.condition = Condition(fill, normal(3, 8, model.joint_dim), normal(3, model.pooled_dim), self.GRID)
        self.cache = make_cache(random_keys(0, 0, 1), tokens, 16, count=2)
        self.transitions = make_transitions(samples=3, tokens=tokens, features=16)

    def log_prob(self, trainable) -> jax.Array:
        def velocity(params, x, t):
            gates, _ = self.model.gates(params, self.condition)
            num_points = len(x) // 3
            condition = jax.tree.map(lambda leaf: repeat_rows(jnp.asarray(leaf), num_points), self.condition)
            arguments = {"adapter": Adapter(repeat_rows(gates, num_points)), "guidance_scale": 30.0}
            return self.model.velocity(params, self.frozen, x, t, condition, **arguments)

        if self.estimator == "sde":
            return sde_log_prob(velocity, trainable, self.transitions)[0]
        return matching_log_prob(velocity, trainable, self.cache, temperature=TEMPERATURE)[0]

    def step(self, trainable, snapshot):
        """Return the new ℓ, the old ℓ from a forward pass of `snapshot`, and the gradient of Σ ρ."""

        def loss(trainable, old):
            log_prob = self.log_prob(trainable)
            return jnp.exp(log_prob - old).sum(), log_prob

        old = jax.lax.stop_gradient(self.log_prob(snapshot))
        (_, log_prob), gradient = jax.value_and_grad(loss, has_aux=True)(trainable, old)
        return log_prob, old, gradient


@pytest.fixture(scope="module")
def make_policy_step(load_tiny_experts):
    """Return a function: (dtype, estimator) -> trainable parameters of tiny experts, and a compiled `Policy.step`."""

    @cache
    def make(dtype, estimator="matching"):
        loaded = load_tiny_experts(jnp.dtype(dtype))
        return loaded.trainable, jax.jit(Policy(loaded, estimator).step)

    return make


@pytest.mark.parametrize("estimator", ["matching", "sde"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_equal_parameters_give_a_ratio_of_one(make_policy_step, dtype, limit, estimator):
    """The old ℓ comes from a forward pass, the new ℓ from a pass with gradient. They differ after an update."""
    trainable, step = make_policy_step(dtype, estimator)
    snapshot = jax.tree.map(np.array, trainable)
    log_prob, old, gradient = step(trainable, snapshot)
    assert np.isfinite(log_prob).all()
    assert np.abs(log_prob - old).max() <= limit

    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(jax.tree.map(np.asarray, gradient))))
    moved = jax.tree.map(lambda x, g: np.asarray(x) - 0.05 * np.asarray(g) / norm, trainable, gradient)
    log_prob, old, _ = step(moved, snapshot)
    assert np.abs(log_prob - old).max() > 10 * limit


def test_the_policy_gradient_reaches_experts_and_router(make_policy_step):
    trainable, step = make_policy_step("float32")
    _, _, gradient = step(trainable, trainable)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_mapping_time_steps_one_by_one_gives_the_same_rows():
    x, t = jnp.arange(24.0).reshape(6, 4, 1), jnp.arange(6.0)
    shapes = []

    def velocity(x, t):
        shapes.append(x.shape)
        return x * t[:, None, None]

    np.testing.assert_array_equal(map_timesteps(velocity, x, t, num_points=3), velocity(x, t))
    assert shapes == [(2, 4, 1), (6, 4, 1)]
