"""Tests the policy loss of each estimator, with a simple function as the velocity."""

from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.rl.estimators import MatchingCache, repeat_rows
from ra_jax.rl.losses import nft_loss, optimality
from ra_jax.rl.policy import PolicySettings, evaluate_policy, norm_excess, policy_cache, policy_loss, velocity_distance
from ra_jax.rl.rollouts import Sample
from ra_jax.rl.strength import PolicyStrength

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
    anchor_rest=False,
    pull_temperature=None,
    noise_level=0.7,
    sde_clip_range=0.02,
    nft_beta=1.0,
    nft_about="old",
)
CONTRAST = replace(MATCHING, estimator="contrast")
STRENGTH = PolicyStrength(*jnp.asarray([5.0, 3.0, 0.2]))
TEMPERATURE = 0.5


def velocity(params, x, t):
    records = repeat_rows(jnp.arange(B), len(x) // B)
    return params[0] * jnp.tanh(x) + params[1] * t[:, None, None] + 0.1 * records[:, None, None]


PARAMS = jnp.asarray([0.6, -0.2])


REFERENCE = jnp.asarray([0.5, -0.1])


def evaluate(params, settings, **arguments):
    cache = policy_cache(SAMPLE, KEYS, REGION, settings)
    if settings.uses_reference:
        cache = replace(cache, reference=velocity(REFERENCE, *cache.points()))
    arguments = {"temperature": TEMPERATURE} | arguments
    return evaluate_policy(velocity, params, cache, settings, **arguments)


def loss_of(settings, params, old_params, *, temperature=TEMPERATURE, **arguments):
    old = evaluate(old_params, settings, temperature=temperature, **arguments).terms
    output = evaluate(params, settings, temperature=temperature, **arguments)
    return policy_loss(output, old, ADVANTAGES, settings, temperature=temperature, strength=STRENGTH)


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
    _, metrics = policy_loss(new, old, ADVANTAGES, settings, temperature=TEMPERATURE)
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


@pytest.mark.parametrize("beta", [0.05, 0.4, 1.0, 3.0])
def test_nft_loss_is_a_linear_pull_plus_an_anchor_of_weight_beta(beta):
    """L(v) − L(v_c) = mean_Ω [ (2r − 1)·2⟨d, v_c − v*⟩ + β·‖d‖² ] with d = v − v_c, computed here term by term."""
    rng = np.random.default_rng(2)
    predicted, center, target = (rng.normal(size=(4, N, C4)) for _ in range(3))
    r, region = np.asarray([0.0, 0.3, 0.5, 1.0]), np.full((4, N, 4), 1 / (4 * N), np.float32)
    difference = nft_loss(predicted, center, target, region, r, beta) - nft_loss(
        center, center, target, region, r, beta
    )
    change = predicted - center
    pull = 2 * (2 * r - 1) * (change * (center - target)).mean((1, 2))
    np.testing.assert_allclose(difference, pull + beta * (change**2).mean((1, 2)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("about", ["old", "reference"])
def test_nft_compares_with_its_center(about):
    settings = replace(MATCHING, estimator="nft", nft_beta=0.3, nft_about=about)
    center = velocity(PARAMS if about == "old" else REFERENCE, *evaluate(PARAMS, settings).cache.points())
    moved = PARAMS + jnp.asarray([0.1, 0.2])
    output = evaluate(moved, settings)
    rows = repeat_rows(optimality(ADVANTAGES), settings.num_pairs)
    region = repeat_rows(REGION, settings.num_pairs)
    expected = nft_loss(output.velocity, center, output.cache.target(), region, rows, 0.3).mean()
    assert float(loss_of(settings, moved, PARAMS)[0]) == pytest.approx(float(expected), rel=1e-5)


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


def test_the_gradient_of_contrast_at_the_reference_is_a_multiple_of_the_gradient_of_matching():
    """At v_θ = v_ref = v_old, ∇ = κ·mean A·∇‖v − v*‖² for every τ. The gradient of matching is mean A/τ·∇‖v − v*‖²."""
    matching = jax.grad(lambda p: loss_of(MATCHING, p, REFERENCE)[0])(REFERENCE)
    for temperature in (0.1, 2.0):
        gradient = jax.grad(lambda p, t=temperature: loss_of(CONTRAST, p, REFERENCE, temperature=t)[0])(REFERENCE)
        np.testing.assert_allclose(gradient, STRENGTH.pull * TEMPERATURE * matching, rtol=1e-4)


def contrast_of_velocities(predicted, old, *, advantages, strength, temperature, settings=CONTRAST):
    """Return the contrast loss of free velocities [R, N, 4C], with the velocities `old` as the old policy."""
    cache = policy_cache(SAMPLE, KEYS, REGION, settings)
    cache = replace(cache, reference=velocity(REFERENCE, *cache.points()))
    new, old = (evaluate_policy(lambda v, *_: v, v, cache, settings, temperature=temperature) for v in (predicted, old))
    return policy_loss(new, old.terms, advantages, settings, temperature=temperature, strength=strength)[0]


@pytest.mark.parametrize("seed", range(8))
def test_contrast_is_convex_in_the_velocity_for_advantages_of_both_signs(seed):
    """The tangent at any velocity is below the loss, for random A, κ, τ, b and any old policy."""
    rng = np.random.default_rng(seed)
    shape = (B * CONTRAST.num_pairs, N, C4)
    x, y, old = (jnp.asarray(rng.normal(size=shape) * scale, jnp.float32) for scale in (1.0, 3.0, 0.5))
    arguments = {
        "advantages": jnp.asarray(rng.normal(size=B) * 2, jnp.float32),
        "strength": PolicyStrength(*jnp.asarray(np.exp(rng.normal(size=3)), jnp.float32)),
        "temperature": float(np.exp(rng.normal())),
    }
    loss, gradient = jax.value_and_grad(contrast_of_velocities)(x, old, **arguments)
    assert float(loss + (gradient * (y - x)).sum()) <= float(contrast_of_velocities(y, old, **arguments)) * (1 + 1e-5)


def test_contrast_comes_to_rest_between_two_results():
    """At t = 1 they share x_t = ε. With advantages ±a the minimum is at v_ref + (a/2b)·(x0_worse − x0_better)."""
    advantage, strength, noise = 1.3, PolicyStrength(*jnp.asarray([5.0, 3.0, 0.2])), STATES[:1, 0]
    region = REGION[:2]
    reference = jnp.tanh(noise)
    cache = MatchingCache(CLEAN[:2], jnp.ones((2, 1)), jnp.stack([noise, noise]), region, 1, reference.repeat(2, 0))
    advantages = jnp.asarray([advantage, -advantage])

    def loss(predicted):
        output = evaluate_policy(lambda v, *_: v.repeat(2, 0), predicted, cache, CONTRAST, temperature=0.3)
        terms = jax.lax.stop_gradient(output.terms)  # the old policy is the current one, as after every sync
        return policy_loss(output, terms, advantages, CONTRAST, temperature=0.3, strength=strength)[0]

    rest = reference + advantage / (2 * strength.anchor) * (CLEAN[1] - CLEAN[0])
    np.testing.assert_allclose(jax.grad(loss)(rest), 0.0, atol=1e-6)
    assert float(jnp.abs(jax.grad(loss)(reference)).max()) > 1e-3
    predicted = reference  # gradient descent with a sync after every step ends there
    for _ in range(200):
        predicted = predicted - 20.0 * jax.grad(loss)(predicted)
    np.testing.assert_allclose(predicted, rest, rtol=1e-3, atol=1e-3)


def test_the_clip_of_contrast_stops_the_pull_of_a_sample_whose_ratio_has_moved_far_enough():
    """Only the anchor has a gradient then."""
    strength = replace(STRENGTH, anchor=jnp.asarray(0.0))
    cache = policy_cache(SAMPLE, KEYS, REGION, CONTRAST)
    reference = velocity(REFERENCE, *cache.points())
    better = reference + 0.1 * (cache.target() - reference)  # ℓ has grown
    arguments = {"advantages": jnp.ones(B), "strength": strength, "temperature": 0.01}
    moved = jax.grad(contrast_of_velocities)(better, reference, **arguments)
    np.testing.assert_array_equal(moved, 0.0)
    back = jax.grad(contrast_of_velocities)(better, reference, **(arguments | {"advantages": -jnp.ones(B)}))
    assert float(jnp.abs(back).max()) > 0  # max(): the worse ratio still counts


def test_the_anchor_has_one_point_from_the_rest_of_the_schedule_if_no_base_loss_holds_there():
    settings = replace(CONTRAST, anchor_rest=True)
    cache = policy_cache(SAMPLE, KEYS, REGION, settings)
    plain = policy_cache(SAMPLE, KEYS, REGION, CONTRAST)
    np.testing.assert_array_equal(cache.times[:, :4], plain.times)
    assert (np.asarray(cache.times[:, 4]) <= 0.3).all() and (np.asarray(cache.times[:, 4]) > 0).all()
    output, without = evaluate(PARAMS, settings), evaluate(PARAMS, CONTRAST)
    distances = cache.mean((output.velocity - velocity(REFERENCE, *cache.points())) ** 2)
    np.testing.assert_allclose(output.anchor, distances[:, :4].mean(1) + 0.3 / 0.7 * distances[:, 4], rtol=1e-5)
    changes = [
        evaluate(PARAMS + 0.1, s).terms["log_prob"] - o.terms["log_prob"]
        for s, o in ((settings, output), (CONTRAST, without))
    ]
    assert changes[0].shape == changes[1].shape == (B,)


@pytest.mark.parametrize("estimator", ["contrast", "matching", "sde", "nft"])
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


def test_norm_excess_penalizes_only_velocities_longer_than_the_reference():
    reference = jnp.ones((2 * B, N, C4))
    factors = jnp.asarray([0.5, 1.0, 1.5, 2.0, 0.1, 1.1])
    excess = norm_excess(factors[:, None, None] * reference, reference, REGION)
    assert float(excess) == pytest.approx(np.mean(np.maximum(np.asarray(factors) - 1, 0) ** 2), rel=1e-4)
