"""Tests routings, the router's features, and the loss that keeps all experts in use."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ra_jax.models.router import Router, RouterConfig, diversity_loss, feature_count, router_features

CHANNELS = 8
ROUTINGS = ("uniform", "fixed", "soft", "topk")


def make_features(batch=6, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, feature_count(CHANNELS))).astype(np.float32)


def router_config(**changes) -> RouterConfig:
    """Return the configuration of soft routing with three experts, with `changes`."""
    config = {"num_experts": 3, "floor": 0.05, "temperature": 1.0, "routing": "soft", "fixed_weights": (0.4, 0.3, 0.3)}
    return RouterConfig(**config | changes)


def make_router(trained=True, **config) -> Router:
    """Create a router; `trained` gives its last layer a random kernel, so that gates differ between images."""
    router = Router(router_config(**config), CHANNELS, nnx.Rngs(0))
    if trained:
        router.logits.kernel[...] = jax.random.normal(jax.random.key(1), router.logits.kernel.shape)
    return router


# --- gates


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gates_are_nonnegative_and_sum_to_1(routing):
    gates = np.asarray(make_router(routing=routing)(make_features()))
    assert gates.shape == (6, 3)
    assert gates.dtype == np.float32
    assert gates.min() >= 0
    np.testing.assert_allclose(gates.sum(axis=-1), 1, atol=1e-6)


def test_uniform_and_fixed_gates_do_not_depend_on_image_or_parameters():
    for config, expected in (
        ({"routing": "uniform", "num_experts": 4, "fixed_weights": (0.25,) * 4}, [0.25] * 4),
        ({"routing": "fixed", "fixed_weights": (1.0, 0.0, 0.0)}, [1, 0, 0]),  # the floor does not apply
    ):
        router = make_router(**config)
        np.testing.assert_allclose(router(make_features()), np.tile(expected, (6, 1)), atol=1e-7)
        grads = jax.grad(lambda router: (router(make_features()) ** 2 * jnp.arange(6.0)[:, None]).sum())(router)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(nnx.state(grads)))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(nnx.state(router)))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("weights", [(0.4, 0.3, 0.3), (0.7, 0.2, 0.06, 0.04)])
def test_soft_gates_of_a_new_router_are_the_fixed_weights(weights, temperature):
    config = {"num_experts": len(weights), "fixed_weights": weights, "floor": 0.03, "temperature": temperature}
    gates = make_router(trained=False, **config)(make_features())
    np.testing.assert_allclose(gates, np.tile(weights, (6, 1)), atol=2e-7)


def test_soft_gates_are_a_softmax_with_a_floor():
    router = make_router(floor=0.1, temperature=0.5)
    features = make_features()
    logits = np.asarray(router.logits(nnx.silu(router.hidden(features))), np.float64) / 0.5
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(router(features), 0.1 + 0.7 * softmax, atol=1e-6)
    router.logits.kernel[...] *= 1e3  # one expert now has almost all of the weight
    gates = np.asarray(router(features))
    np.testing.assert_allclose([gates.min(), gates.max()], [0.1, 0.8], atol=1e-6)


def test_topk_gates_are_the_k_largest_soft_gates_with_the_gradient_of_soft_gates():
    features, target = make_features(), make_features(6, seed=1)[:, :3]
    soft = make_router(routing="soft")
    expected_grad = jax.grad(lambda router: (router(features) * target).sum())(soft)
    for k in (1, 2):
        hard = make_router(routing="topk", top_k=k)
        gates, probabilities = np.asarray(hard(features)), np.asarray(soft(features))
        largest = np.sort(probabilities, axis=-1)[:, -k:].min(axis=-1, keepdims=True) <= probabilities
        expected = np.where(largest, probabilities, 0)
        np.testing.assert_allclose(gates, expected / expected.sum(-1, keepdims=True), atol=1e-6)
        assert ((gates > 0).sum(axis=-1) == k).all()
        if k == 1:
            assert set(np.unique(gates)) == {0, 1}
        grad = jax.grad(lambda router: (router(features) * target).sum())(hard)
        leaves, expected_leaves = (jax.tree.leaves(nnx.state(tree)) for tree in (grad, expected_grad))
        for got, expected in zip(leaves, expected_leaves, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"routing": "hard"}, "routing 'hard' is unknown: expected one of uniform, fixed, soft, topk"),
        ({"floor": 0.34}, "router_floor is 0.34 for 3 experts: expected at least 0 and less than"),
        ({"floor": 1 / 3}, "less than 1/num_experts = 0.333"),
        ({"temperature": 0.0}, "routing_temperature is 0.0"),
        ({"num_experts": 2}, "fixed_expert_weights has 3 values: expected 2, one per expert"),
        ({"fixed_weights": (0.5, 0.3, 0.3)}, "expected weights from 0 to 1 that sum to 1"),
        ({"fixed_weights": (0.9, 0.05, 0.05)}, "each must exceed router_floor, 0.05"),
        ({"top_k": 4}, "top_k is 4: expected 1 to num_experts, 3"),
        ({"hidden": 0}, "hidden is 0: expected 1 or more"),
    ],
)
def test_a_wrong_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        router_config(**config)


# --- features


def make_latents_and_mask(rows=8, cols=10, seed=0):
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(1, rows, cols, CHANNELS)).astype(np.float32)
    mask = np.zeros((1, rows, cols), np.float32)
    mask[:, 3:5, 4:6] = 1
    return latents, mask


def features_of(latents, mask, **options):
    batch, rows, cols, _ = latents.shape
    return np.asarray(
        router_features(latents.reshape(batch, -1, CHANNELS), mask.reshape(batch, -1), (rows, cols), **options)
    )


def test_features_are_statistics_of_the_ring_around_the_mask_and_of_the_rest():
    latents, mask = make_latents_and_mask()
    near = np.zeros(mask.shape, bool)
    near[:, 1:7, 2:8] = True  # the mask's 2 by 2 tokens and two around them
    expected = []
    for region in (near & (mask == 0), ~near):
        expected += [latents[region].mean(axis=0), latents[region].std(axis=0)]
    expected.append([math.sqrt(4 / 80), 1.0])  # 4 of 80 tokens; a square
    got = features_of(latents, mask)
    assert got.shape == (1, feature_count(CHANNELS))
    np.testing.assert_allclose(got[0], np.concatenate(expected), rtol=1e-5, atol=1e-6)


def test_features_do_not_depend_on_latents_under_the_mask():
    latents, mask = make_latents_and_mask()
    changed = latents + 5 * mask[..., None]
    np.testing.assert_array_equal(features_of(latents, mask), features_of(changed, mask))


def test_features_depend_on_the_chosen_panel_only():
    latents, mask = make_latents_and_mask()
    wide, wide_mask = (np.concatenate([make_latents_and_mask(seed=1)[i], (latents, mask)[i]], axis=2) for i in range(2))
    right = features_of(wide, wide_mask, panel_columns=slice(10, 20))
    np.testing.assert_allclose(right, features_of(latents, mask), rtol=1e-6)


def test_the_last_feature_measures_how_ragged_the_edge_of_the_mask_is():
    latents, mask = make_latents_and_mask()
    comb = np.zeros_like(mask)
    comb[:, 2:6, 1:9:2] = 1
    bar = np.zeros_like(mask)
    bar[:, 4, 1:9] = 1
    square, bar, comb = (features_of(latents, m)[0, -1] for m in (mask, bar, comb))
    np.testing.assert_allclose([square, bar, comb], [1, 18 / (4 * math.sqrt(8)), 40 / (4 * 4)], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_features_of_an_empty_mask_and_of_a_full_mask_are_finite(value):
    latents, mask = make_latents_and_mask()
    got = features_of(latents, np.full_like(mask, value))
    assert np.isfinite(got).all()
    empty = slice(0, 2 * CHANNELS) if value == 0 else slice(0, 4 * CHANNELS)
    assert not got[0, empty].any()


def test_features_of_a_wrong_grid_are_refused():
    with pytest.raises(ValueError, match=r"masked_latents has 80 tokens: expected 72 for token grid \(8, 9\)"):
        router_features(jnp.zeros((1, 80, CHANNELS)), jnp.zeros((1, 80)), (8, 9))


# --- diversity


def diversity_of(gates, mean, **options):
    return diversity_loss(jnp.asarray(gates), jnp.ones(len(gates)), jnp.asarray(mean), **options)[0]


@pytest.mark.parametrize("experts", [2, 3, 5])
@pytest.mark.parametrize("specialization", [0.5, 0.2])
def test_diversity_loss_of_uniform_one_hot_and_collapsed_gates(experts, specialization):
    mean = np.full(experts, 1 / experts, np.float32)
    uniform, one_hot = np.tile(mean, (2 * experts, 1)), np.tile(np.eye(experts, dtype=np.float32), (2, 1))
    full = math.log(experts)
    options = {"specialization": specialization}
    np.testing.assert_allclose(diversity_of(uniform, mean, **options), (specialization - 1) * full, rtol=1e-5)
    specialized = specialization * (full - 0.25)  # no image gains from gates further from uniform
    np.testing.assert_allclose(diversity_of(one_hot, mean, **options), specialized - full, rtol=1e-5)  # the minimum
    collapsed = np.tile(np.eye(experts, dtype=np.float32)[0], (4, 1))
    np.testing.assert_allclose(diversity_of(collapsed, collapsed[0], **options), specialized, atol=1e-5)


def test_diversity_value_and_running_mean_follow_the_formula():
    rng = np.random.default_rng(0)
    gates = rng.dirichlet(np.ones(3), size=5).astype(np.float32)
    weights = np.array([1, 0.5, 0.5, 1, 0], np.float32)  # rows 1 and 2 are one condition, row 4 is padding
    mean = rng.dirichlet(np.ones(3)).astype(np.float32)
    loss, new_mean = diversity_loss(gates, weights, mean, decay=0.8, specialization=0.3)
    batch_mean = (weights[:, None] * gates).sum(0) / 3
    expected_mean = 0.8 * mean + 0.2 * batch_mean
    np.testing.assert_allclose(new_mean, expected_mean, rtol=1e-6)

    def entropy(p):
        return -(p * np.log(p)).sum(-1)

    bounded = np.maximum(entropy(gates), math.log(3) - 0.25)
    assert (bounded > entropy(gates)).any() and (bounded == entropy(gates)).any()
    expected = 0.3 * (weights * bounded).sum() / 3 - entropy(expected_mean)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_balance_gradient_is_not_scaled_by_the_decay():
    rng = np.random.default_rng(1)
    gates = rng.dirichlet(np.ones(3), size=4).astype(np.float32)
    mean = gates.mean(axis=0)  # equal to the batch mean, so that the updated mean is the same for every decay
    expected = np.tile((np.log(mean) + 1) / 4, (4, 1))
    for decay in (0.0, 0.9, 0.99):
        grad = jax.grad(lambda gates, decay=decay: diversity_of(gates, mean, decay=decay, specialization=0.0))(gates)
        np.testing.assert_allclose(grad, expected, rtol=1e-5)
    # No gradient flows through the running mean.
    carried = jax.grad(lambda gates: diversity_loss(gates, jnp.ones(4), jnp.asarray(mean))[1].sum())(gates)
    assert not np.any(carried)


def test_gates_that_are_specialized_enough_are_not_pushed_further():
    gates = np.asarray([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]], np.float32)
    mean = gates.mean(0)
    balance = jax.grad(lambda gates: diversity_of(gates, mean, specialization=0.0))(gates)
    np.testing.assert_array_equal(jax.grad(lambda gates: diversity_of(gates, mean, specialization=0.5))(gates), balance)


def test_one_hot_gates_have_finite_gradients():
    one_hot = jnp.eye(3)[jnp.array([0, 0, 1])]
    grad = jax.grad(lambda gates: diversity_of(gates, [1.0, 0.0, 0.0]))(one_hot)
    assert np.isfinite(grad).all()


def test_sums_over_devices_give_the_loss_of_the_whole_batch():
    rng = np.random.default_rng(2)
    gates = jnp.asarray(rng.dirichlet(np.ones(3), size=8), jnp.float32)
    weights = jnp.asarray(rng.uniform(0.2, 1, size=8), jnp.float32)
    mean = jnp.asarray([0.5, 0.3, 0.2])
    whole = diversity_loss(gates, weights, mean)
    parts = jax.vmap(
        lambda gates, weights: diversity_loss(gates, weights, mean, all_sum=lambda x: jax.lax.psum(x, "devices")),
        axis_name="devices",
    )(gates.reshape(4, 2, 3), weights.reshape(4, 2))
    for got, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=1e-5)


def test_the_diversity_loss_balances_and_specializes_an_unbalanced_router():
    features = make_features(64)
    start_weights = (0.8, 0.12, 0.08)  # all different, because equal experts would get equal gradients
    router = make_router(trained=False, fixed_weights=start_weights)
    graphdef, params = nnx.split(router)
    optimizer = optax.adam(1e-3)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, opt_state, mean = carry
            batch = jax.random.choice(key, features, (8,), replace=False)

            def loss(params):
                return diversity_loss(nnx.merge(graphdef, params)(batch), jnp.ones(8), mean)

            grads, mean = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state, mean), None

        start = params, optimizer.init(params), jnp.asarray(start_weights)
        return jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 1500))[0]

    params, _, running_mean = train(params)
    gates = np.asarray(nnx.merge(graphdef, params)(features))
    usage = np.bincount(gates.argmax(axis=-1), minlength=3) / len(gates)
    assert usage.min() > 0.2, usage
    assert gates.mean(axis=0).min() > 0.2
    assert np.asarray(running_mean).min() > 0.2
    # Before training, every image has 0.8 for the same expert. The gates specialize, and do not harden.
    assert 0.5 < np.mean(gates.max(axis=-1)) < 0.8
    assert np.ptp(gates, axis=0).min() > 0.2
    assert gates.min() >= 0.05 - 1e-6
