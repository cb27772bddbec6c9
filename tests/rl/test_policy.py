"""Tests the policy loss of each estimator, with a simple function as the velocity."""

from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.rl.estimators import repeat_rows
from ra_jax.rl.losses import nft_loss, optimality
from ra_jax.rl.policy import PolicySettings, evaluate_policy, policy_cache, policy_loss, velocity_distance
from ra_jax.rl.rollouts import Sample

if find_spec("torch"):
    import torch

B, N, C4 = 3, 6, 8
ADVANTAGES = jnp.asarray([1.5, -0.7, 0.2])
RNG = np.random.default_rng(0)
CLEAN = jnp.asarray(RNG.normal(size=(B, N, C4)), jnp.float32)
STATES = jnp.asarray(RNG.normal(size=(B, 3, N, C4)), jnp.float32)
REGION = jnp.full((B, N, 4), 1 / (4 * N), jnp.float32)
SAMPLE = Sample(CLEAN, states=STATES, times=jnp.asarray([0.8, 0.6, 0.4]))
KEYS = jax.vmap(jax.random.key)(jnp.arange(B))

MATCHING = PolicySettings(
    estimator="matching",
    clip_range=0.2,
    num_pairs=4,
    time_fraction=0.7,
    noise_level=0.7,
    sde_clip_range=0.02,
    nft_beta=1.0,
)


def velocity(params, x, t):
    records = repeat_rows(jnp.arange(B), len(x) // B)
    return params[0] * jnp.tanh(x) + params[1] * t[:, None, None] + 0.1 * records[:, None, None]


PARAMS = jnp.asarray([0.6, -0.2])


def evaluate(params, settings, **arguments):
    return evaluate_policy(
        velocity, params, policy_cache(SAMPLE, KEYS, REGION, settings), settings, temperature=0.5, **arguments
    )


def loss_of(settings, params, old_params, **arguments):
    old = evaluate(old_params, settings, **arguments).terms
    return policy_loss(evaluate(params, settings, **arguments), old, ADVANTAGES, settings)


@pytest.mark.parametrize("estimator", ["matching", "sde"])
def test_gradient_at_equal_policies_is_the_advantage_weighted_gradient_of_the_log_probability(estimator):
    """REINFORCE with a baseline: ∇(−mean A·ρ) = −mean A·∇ℓ at ρ = 1."""
    settings = replace(MATCHING, estimator=estimator)
    (loss, metrics), gradient = jax.value_and_grad(lambda p: loss_of(settings, p, PARAMS), has_aux=True)(PARAMS)
    assert float(loss) == pytest.approx(-float(ADVANTAGES.mean()), rel=1e-5)
    assert float(metrics["mean_ratio"]) == 1.0

    def log_prob(params):
        return evaluate(params, settings).terms["log_prob"]

    scale = 1.0 if estimator == "matching" else np.sqrt(N * C4 * 2)  # elements of a step, two steps
    expected = -scale * (ADVANTAGES[:, None] * jax.jacobian(log_prob)(PARAMS)).mean(0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)


def test_sde_ratios_are_clipped_at_sde_clip_range():
    settings = replace(MATCHING, estimator="sde", sde_clip_range=1e-4, clip_range=0.9)
    moved = PARAMS + 0.01
    assert float(loss_of(settings, moved, PARAMS)[1]["clip_fraction"]) == 1.0
    wide = replace(settings, sde_clip_range=0.9)
    assert float(loss_of(wide, moved, PARAMS)[1]["clip_fraction"]) == 0.0


@pytest.mark.parametrize("estimator", ["matching", "sde"])
def test_the_ratio_includes_the_probability_of_the_sampled_expert(estimator):
    settings = replace(MATCHING, estimator=estimator)
    old = evaluate(PARAMS, settings, routing_log_prob=jnp.log(jnp.full(B, 0.5))).terms
    new = evaluate(PARAMS, settings, routing_log_prob=jnp.log(jnp.full(B, 0.55)))
    _, metrics = policy_loss(new, old, ADVANTAGES, settings)
    assert float(metrics["mean_ratio"]) == pytest.approx(1.1, rel=1e-4)


@pytest.mark.torch
def test_nft_loss_and_gradient_match_the_formula_of_the_paper():
    """The formula is computed in torch."""
    rng = np.random.default_rng(1)
    new, old, target = (rng.normal(size=(4, N, C4)).astype(np.float32) for _ in range(3))
    r, beta, region = np.asarray([0.0, 0.3, 0.5, 1.0], np.float32), 0.6, np.full((4, N, 4), 1 / (4 * N), np.float32)
    loss, gradient = jax.value_and_grad(lambda v: nft_loss(v, old, target, region, r, beta).sum())(new)
    v = torch.from_numpy(new).requires_grad_()
    v_old, v_target, weight = (torch.from_numpy(x) for x in (old, target, r))
    better = (((1 - beta) * v_old + beta * v - v_target) ** 2).mean((1, 2))
    worse = (((1 + beta) * v_old - beta * v - v_target) ** 2).mean((1, 2))
    theirs = ((weight * better + (1 - weight) * worse) / beta).sum()
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, v.grad, rtol=1e-4, atol=1e-7)


def test_optimality_is_one_half_for_an_advantage_of_0_and_clipped_to_0_and_1():
    np.testing.assert_allclose(optimality(jnp.asarray([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0])), [0, 0, 0.5, 0.75, 1, 1])


def test_nft_gradient_at_equal_policies_is_a_multiple_of_the_gradient_of_matching():
    """∇ = mean (2r − 1)·∇‖v − v*‖² = mean A/5·∇error for every β. The gradient of matching is mean A/τ·∇error."""
    gradients = [
        jax.grad(lambda p, beta=beta: loss_of(replace(MATCHING, estimator="nft", nft_beta=beta), p, PARAMS)[0])(PARAMS)
        for beta in (0.1, 1.0)
    ]
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-3)
    matching = jax.grad(lambda p: loss_of(MATCHING, p, PARAMS)[0])(PARAMS)
    np.testing.assert_allclose(gradients[1], 0.5 / 5 * matching, rtol=1e-3)


def test_nft_reports_the_mean_squared_change_of_velocities():
    settings = replace(MATCHING, estimator="nft")
    assert float(loss_of(settings, PARAMS, PARAMS)[1]["policy_change"]) == 0.0
    moved = loss_of(settings, PARAMS + jnp.asarray([0.0, 0.1]), PARAMS)[1]["policy_change"]
    times = evaluate(PARAMS, settings).cache.times
    assert float(moved) == pytest.approx(float((0.01 * times**2).mean()), rel=1e-4)


@pytest.mark.parametrize("estimator", ["matching", "sde", "nft"])
def test_no_gradient_flows_into_the_old_policy(estimator):
    settings = replace(MATCHING, estimator=estimator)
    gradient = jax.grad(lambda old: loss_of(settings, PARAMS + 0.01, old)[0])(PARAMS)
    np.testing.assert_array_equal(gradient, 0.0)


def test_velocity_distance_is_the_mean_square_over_the_region_of_each_record():
    region = np.zeros((B, N, 4), np.float32)
    region[np.arange(B), np.arange(B), 0] = 1.0  # record i: only the first cell of token i
    velocities = np.random.default_rng(1).normal(size=(2 * B, N, C4)).astype(np.float32)  # two time steps per record
    ours = velocity_distance(jnp.asarray(velocities), jnp.zeros_like(velocities), jnp.asarray(region))
    cells = [(velocities[row, row // 2].reshape(C4 // 4, 4)[:, 0] ** 2).mean() for row in range(2 * B)]
    assert float(ours) == pytest.approx(np.mean(cells), rel=1e-5)
