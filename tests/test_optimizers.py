"""Optimizers and schedules compared with closed forms and torch, on trees like those of training."""

from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ra_jax.config.settings import OptimizationConfig
from ra_jax.optimizers import build_optimizer, learning_rate_schedule, muon_dimensions, weight_decay_mask

if find_spec("torch"):
    import torch

CONFIG = OptimizationConfig(learning_rate=0.1, adam_weight_decay=0.01, max_grad_norm=1e9)


class Layer(nnx.Module):
    """A stacked linear layer, its experts, and a norm: one leaf of every kind."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((2, 3, 4)))
        self.bias = nnx.Param(jnp.ones((2, 4)))
        self.scale = nnx.Param(jnp.ones((4,)))
        self.lora_a = nnx.LoRAParam(jnp.ones((2, 3, 6)))
        self.lora_b = nnx.LoRAParam(jnp.ones((2, 6, 4)))


@pytest.fixture
def params():
    return {"flux": nnx.state(Layer()), "router": nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))}


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None or hasattr(x, "reduction_axis"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf for path, leaf in leaves
    }


def test_weight_decay_applies_to_matrices_only(params):
    marked = {name for name, flag in by_name(weight_decay_mask(params)).items() if flag}
    assert marked == {"flux/kernel", "flux/lora_a", "flux/lora_b", "router/kernel"}


def test_muon_updates_stacked_matrices_and_adam_stacked_biases(params):
    muon_leaves = {name: dims for name, dims in by_name(muon_dimensions(params)).items() if dims is not None}
    assert set(muon_leaves) == {"flux/kernel", "flux/lora_a", "flux/lora_b", "router/kernel"}
    assert (muon_leaves["flux/kernel"].reduction_axis, muon_leaves["flux/kernel"].output_axis) == (1, 2)
    assert (muon_leaves["router/kernel"].reduction_axis, muon_leaves["router/kernel"].output_axis) == (0, 1)


def test_muon_orthogonalizes_each_stacked_matrix_separately(params):
    optimizer, _ = build_optimizer(replace(CONFIG, optimizer="muon", adam_weight_decay=0.0), 10)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for matrix in np.asarray(by_name(updates)["flux/lora_a"]):
        singular = np.linalg.svd(matrix, compute_uv=False)
        # Five Newton-Schulz steps make the singular values similar, but not exactly 1.
        assert singular.max() / singular.min() < 2.0


@pytest.mark.torch
def test_adamw_equals_torch():
    rng = np.random.default_rng(1)
    start, gradients = rng.normal(size=(3, 2)).astype(np.float32), rng.normal(size=(5, 3, 2)).astype(np.float32)
    reference = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([reference], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    ours, _ = build_optimizer(CONFIG, 5)
    params = {"flux": {"kernel": jnp.asarray(start)}}
    state = ours.init(params)
    for gradient in gradients:
        reference.grad = torch.tensor(gradient)
        theirs.step()
        updates, state = ours.update({"flux": {"kernel": jnp.asarray(gradient)}}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["flux"]["kernel"], reference.detach(), rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "prodigy"])
def test_every_optimizer_descends(name, params):
    rate = {"prodigy": 1.0, "muon": 0.2}.get(name, 0.05)
    optimizer, _ = build_optimizer(replace(CONFIG, optimizer=name, learning_rate=rate, adam_weight_decay=0.0), 60)
    target = jax.tree.map(lambda p: p + 1.0, params)

    def loss(params):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    first, state = loss(params), optimizer.init(params)
    for _ in range(60):
        params, state = step(params, state)
    assert loss(params) < 0.5 * first


def test_weight_decay_means_the_same_for_adafactor_as_for_adamw():
    """With zero gradients only weight decay changes the weights: p ← p·(1 − lr·decay)."""
    params = {"flux": {"kernel": jnp.full((4, 4), 2.0), "bias": jnp.full((4,), 2.0)}}
    for name in ("adamw", "adafactor"):
        optimizer, _ = build_optimizer(replace(CONFIG, optimizer=name), 10)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        np.testing.assert_allclose(updates["flux"]["kernel"], -0.1 * 0.01 * 2.0, rtol=1e-5)
        np.testing.assert_allclose(updates["flux"]["bias"], 0.0, atol=1e-9)


def test_gradients_are_scaled_to_the_global_norm():
    optimizer, _ = build_optimizer(replace(CONFIG, max_grad_norm=1.0, optimizer="adamw"), 10)
    clip = optax.clip_by_global_norm(1.0)
    params = {"flux": {"kernel": jnp.ones((2, 2))}}
    gradients = {"flux": {"kernel": jnp.full((2, 2), 100.0)}}
    scaled, _ = clip.update(gradients, clip.init(params))
    np.testing.assert_allclose(optax.tree.norm(scaled), 1.0, rtol=1e-6)
    # Adam's first moment after one step is (1 − β1) times the gradient.
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    first_moment = next(s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    np.testing.assert_allclose(first_moment["flux"]["kernel"], 0.1 * scaled["flux"]["kernel"], rtol=1e-5)


def test_router_has_its_own_learning_rate(params):
    optimizer, _ = build_optimizer(replace(CONFIG, router_learning_rate=0.0, adam_weight_decay=0.0), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates["router"]))
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(updates["flux"]))


@pytest.mark.parametrize(
    ("name", "middle", "end"),
    [
        ("constant", 1, 1),
        ("constant_with_warmup", 1, 1),
        ("linear", 0.5, 0),
        ("cosine", 0.5, 0),
        ("polynomial", 0.25, 0),
    ],
)
def test_schedules(name, middle, end):
    config = replace(CONFIG, lr_scheduler=name, lr_warmup_steps=10, lr_power=2.0)
    schedule = learning_rate_schedule(config, 1.0, 110)
    if name != "constant":
        np.testing.assert_allclose(schedule(0), 1 / 11, rtol=1e-6)
        assert schedule(0) < schedule(5) < schedule(10)
    np.testing.assert_allclose(schedule(10), 1.0)
    np.testing.assert_allclose(schedule(60), middle, atol=1e-6)
    np.testing.assert_allclose(schedule(110), end, atol=1e-6)


def test_schedules_count_steps_however_many_updates_a_step_makes():
    """For a constant gradient, Adam's first updates equal the learning rate: three updates per step."""
    config = replace(CONFIG, adam_weight_decay=0.0, lr_scheduler="linear")
    optimizer, schedule = build_optimizer(config, total_steps=4, updates=3)
    params, gradient = {"kernel": jnp.zeros(())}, {"kernel": jnp.ones(())}
    state, sizes = optimizer.init(params), []
    for _ in range(12):
        update, state = optimizer.update(gradient, state, params)
        sizes.append(-float(update["kernel"]))
    np.testing.assert_allclose(sizes, np.repeat([float(schedule(step)) for step in range(4)], 3), rtol=1e-4)
    assert schedule(0) == pytest.approx(0.1) and schedule(3) == pytest.approx(0.025)
