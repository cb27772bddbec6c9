"""Tests the train step: weights that change, the ratio of equal policies, accumulation, and the moving average."""

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.parallel.collectives import all_mean
from ra_jax.parallel.partitioning import named_leaves
from ra_jax.rl.rollouts import Sample
from ra_jax.training.programs import CompiledSteps
from ra_jax.training.setup import Setup, set_up
from ra_jax.training.step.encode import LossContext, encode
from ra_jax.training.step.settings import StepSettings
from ra_jax.training.step.state import TrainState
from ra_jax.training.step.train_step import update_ema, update_temperature

STANDARD = {
    "use_grpo": False,
    "use_human_scores": False,
    "enable_grpo_rewards": False,
    "enable_grpo_loss": False,
}


NO_UPDATES = {"learning_rate": 1e-30, "adam_weight_decay": 0.0}  # this rate is too small to change any weight


@dataclass(frozen=True)
class Run:
    """The first steps of a run.

    Attributes:
        setup: the set-up of the run.
        frozen_before: copy of the frozen weights before the first step.
        trainable_before: copy of the trainable weights before the first step.
        state: train state after the last step.
        metrics: one dictionary per step.
        steps: compiled train steps.
    """

    setup: Setup
    frozen_before: Any
    trainable_before: Any
    state: TrainState
    metrics: list[dict[str, Any]]
    steps: CompiledSteps


def copy_tree(tree):
    return jax.tree.map(np.array, tree)


def run_config(config, count):
    """Set up a run and take its first `count` steps."""
    setup = set_up(config)
    frozen, trainable = copy_tree(setup.frozen), copy_tree(setup.state.trainable)
    steps, state, metrics = setup.compiled_steps(), setup.state, []
    for batch in islice(setup.batches(), count):
        state, row = steps(state, setup.frozen, batch)
        metrics.append(jax.device_get(row))
    return Run(setup, frozen, trainable, state, metrics, steps)


@pytest.fixture(scope="module")
def human_run(make_config_in, tmp_path_factory):
    """Return seven steps of human-scored GRPO, for all tests that only read the results."""
    return run_config(make_config_in(tmp_path_factory.mktemp("human")), 7)


def test_base_stays_bit_identical_while_all_experts_and_the_router_change(human_run, find_changed_leaves):
    before = human_run.trainable_before
    assert find_changed_leaves(human_run.frozen_before, human_run.setup.frozen) == set()
    assert find_changed_leaves(before, human_run.state.trainable) == set(named_leaves(before))
    assert {"router/hidden/kernel", "router/logits/kernel"} <= set(named_leaves(before))


def test_ratio_is_one_after_a_sync_and_differs_from_one_at_other_steps(human_run):
    ratios = [float(row["mean_ratio"]) for row in human_run.metrics]
    assert [ratio == 1.0 for ratio in ratios] == [True, False, False, True, False, False, True]


def test_the_policy_has_a_gradient_at_a_ratio_of_one(make_config):
    """In a step that syncs, ρ is 1 for any parameters, but log ρ has a gradient. The other losses have weight 0."""
    (first,) = run_config(make_config(base_loss_weight=0.0, diversity_loss_weight=0.0), 1).metrics
    assert first["mean_ratio"] == 1.0 and first["approx_kl"] == 0.0
    assert first["grad_norm"] > 0.0


def test_the_step_compiles_once(human_run):
    assert len(human_run.steps) == 1


def test_metrics_of_scores_are_the_batch_means(human_run):
    setup, metrics = human_run.setup, human_run.metrics
    batch = next(setup.batches())
    np.testing.assert_allclose(metrics[0]["mean_reward"], np.mean(batch["reward"]), rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["removal_score"], np.mean(batch["scores"][..., 0]), rtol=1e-5)
    usage = [metrics[0][f"routing_expert_{i}_usage"] for i in range(3)]
    np.testing.assert_allclose(sum(usage), 1.0, rtol=1e-5)
    assert metrics[0]["frac_reward_zero_std"] == 0.0


def test_clip_fraction_at_sync_is_that_of_the_last_step_before_a_sync(human_run):
    rows = human_run.metrics
    assert np.isnan([row["clip_fraction_at_sync"] for row in rows[:2]]).all()  # not measured yet
    assert [row["clip_fraction_at_sync"] for row in rows[2:5]] == [rows[2]["clip_fraction"]] * 3
    assert rows[5]["clip_fraction_at_sync"] == rows[5]["clip_fraction"]


@pytest.mark.parametrize(("precision", "bound"), [("no", 1e-6), ("bf16", 1e-3)])
def test_equal_parameters_give_equal_log_probabilities(make_config, with_optimizations, precision, bound):
    """Bound |Δℓ| for θ = θ_old in the step's own graph. The weights do not change during the run.

    The error of a random model is about 1.5, where float32 resolves 1.2e-7. At τ = 1 that is within the bound. At the
    default τ = 0.1 one unit in the last place would be 1.2e-6.
    """
    metrics = run_config(make_config(mixed_precision=precision, policy_temperature=1.0, **NO_UPDATES), 3).metrics
    for row in metrics:
        assert abs(np.log(float(row["mean_ratio"]))) <= bound
        assert row["clip_fraction"] == 0.0


@pytest.mark.parametrize(
    ("flags", "trained_parts"),
    [
        (STANDARD | {"routing": "topk"}, {"flux", "router"}),
        (STANDARD | {"use_lora": False}, {"flux"}),
    ],
)
def test_standard_mode_trains_experts_and_router_or_the_whole_transformer(
    make_config, find_changed_leaves, flags, trained_parts
):
    steps = run_config(make_config(adam_weight_decay=0.0, **flags), 2)
    assert find_changed_leaves(steps.frozen_before, steps.setup.frozen) == set()
    changed = find_changed_leaves(steps.trainable_before, steps.state.trainable)
    assert {name.split("/")[0] for name in changed} == trained_parts
    assert np.isfinite(steps.metrics[-1]["train_loss"])
    if not flags.get("use_lora", True):
        # Guidance is constant and pooled text is zero, so only the kernels of their embedders may stay unchanged.
        unchanged = set(named_leaves(steps.trainable_before)) - changed
        assert unchanged <= {"flux/time_text_embed/text_embedder/linear_1/kernel"}


def test_without_the_grpo_loss_there_are_no_policy_settings_and_no_old_policy(make_config):
    setup = set_up(make_config(enable_grpo_loss=False))
    assert setup.objective.settings.policy is None and setup.state.old_params is None
    assert "reward" in next(setup.batches())


def test_two_accumulated_microbatches_equal_one_batch(make_config_in, tmp_path):
    """In standard mode, random draws depend on record and step only, so that two half batches equal a whole batch."""
    whole = run_config(make_config_in(tmp_path / "whole", train_batch_size=8, **STANDARD), 1)
    halves = run_config(
        make_config_in(tmp_path / "halves", train_batch_size=4, gradient_accumulation_steps=2, **STANDARD), 1
    )
    np.testing.assert_allclose(whole.metrics[0]["base_loss"], halves.metrics[0]["base_loss"], rtol=1e-5)
    before, ours = named_leaves(whole.trainable_before), named_leaves(whole.state.trainable)
    theirs = named_leaves(halves.state.trainable)
    for name in before:
        if name.startswith("flux") and name.endswith("lora_b"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-5)


def test_accumulation_does_not_change_diversity_loss_and_reward_metrics(make_config_in, tmp_path):
    """Microbatches of 3 records split scenes of 4. A scene still counts once.

    The running mean of the gates is updated once per step.
    """
    whole = run_config(make_config_in(tmp_path / "whole", train_batch_size=12), 2)
    parts = run_config(make_config_in(tmp_path / "parts", train_batch_size=3, gradient_accumulation_steps=4), 2)
    names = ("diversity_loss", "reward_std", "frac_reward_zero_std", "mean_reward")
    names += tuple(f"routing_expert_{i}_{metric}" for i in range(3) for metric in ("usage", "weight"))
    for ours, theirs in zip(whole.metrics, parts.metrics, strict=True):
        for name in names:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(whole.state.router_mean, parts.state.router_mean, rtol=1e-4)
    assert np.abs(np.asarray(whole.state.router_mean) - 1 / 3).max() > 1e-3


def test_the_distance_from_the_reference_and_the_norm_guard_start_at_zero(make_config):
    metrics = run_config(make_config(norm_guard_weight=1.0, learning_rate=0.1), 3).metrics
    assert metrics[0]["reference_distance"] == metrics[0]["norm_guard_loss"] == 0.0
    assert metrics[2]["reference_distance"] > 0.0 and metrics[2]["norm_guard_loss"] > 0.0


def test_a_quantized_base_is_the_reference_of_its_experts(make_config):
    """The distance starts at exactly 0: the reference is the same int8 base, not the weights it was made from."""
    metrics = run_config(make_config(base_precision="int8", learning_rate=0.1), 3).metrics
    assert metrics[0]["reference_distance"] == metrics[0]["policy_loss"] == 0.0 and metrics[0]["mean_ratio"] == 1.0
    assert metrics[2]["reference_distance"] > 0.0 and metrics[1]["policy_loss"] != 0.0


def test_kl_weight_adds_the_distance_to_the_base(make_config):
    """New experts have B = 0 and no effect, so the distance is 0 before the first update and positive after it."""
    metrics = run_config(make_config(kl_weight=1.0), 2).metrics
    assert metrics[0]["kl_loss"] == 0.0 and metrics[1]["kl_loss"] > 0.0
    assert metrics[0]["velocity_norm_ratio"] == 1.0 and metrics[1]["velocity_norm_ratio"] != 1.0


def test_kl_weight_without_experts_is_the_distance_to_the_initial_transformer(make_config):
    """The initial transformer is a copy, which the updates do not reach."""
    metrics = run_config(make_config(kl_weight=1.0, use_lora=False, learning_rate=1e-3), 2).metrics
    assert metrics[0]["kl_loss"] == 0.0 and metrics[1]["kl_loss"] > 0.0


def test_dropout_acts_in_the_base_loss_only(make_config):
    """Dropout changes the base loss but not the policy loss: for θ = θ_old, ρ is 1 with dropout, too."""
    setup = set_up(make_config(lora_dropout=0.5))
    state, batch = setup.state, jax.tree.map(lambda x: x[0], next(setup.batches()))
    random_b = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype), setup.state.trainable["flux"]
    )
    trainable = {**state.trainable, "flux": random_b}
    objective, frozen = setup.objective, setup.frozen
    encoded = encode(objective.model, frozen, batch, "balanced")
    sample = Sample(encoded.clean)
    context = LossContext(frozen, batch, encoded, state.seed, state.temperature, state.strength)
    reference = objective.reference_velocity(trainable, context, sample)
    old = objective.evaluate_policy(trainable, context, sample, reference).terms

    def losses(dropout):
        changed = replace(objective, settings=replace(objective.settings, dropout=dropout))
        base, _ = changed.base_loss(trainable, context, state.step)
        arguments = (trainable, context, sample, batch["advantage"], old, reference)
        policy, (metrics, _) = changed.policy_loss(*arguments, on_policy=jnp.asarray(False))
        return base, policy, metrics["mean_ratio"]

    with_dropout, without_dropout = losses(True), losses(False)
    assert with_dropout[0] != without_dropout[0]
    np.testing.assert_allclose(with_dropout[1], without_dropout[1], atol=1e-6)
    np.testing.assert_allclose(with_dropout[2], 1.0, atol=1e-5)


def test_the_moving_average_has_a_warm_up(human_run):
    state = replace(human_run.state, ema={"w": jnp.asarray(1.0)}, step=jnp.asarray(4))
    assert update_ema(state, {"w": jnp.asarray(2.0)}, 0.99)["w"] == pytest.approx(1.0 + (1 - 5 / 14))
    late = replace(state, step=jnp.asarray(10**6))
    assert update_ema(late, {"w": jnp.asarray(2.0)}, 0.99)["w"] == pytest.approx(1.01)


def test_the_temperature_adapts_only_at_the_last_step_before_a_sync(human_run):
    state = replace(human_run.state, temperature=jnp.asarray(0.1))
    settings = StepSettings(
        num_updates=1, sync_steps=8, adapt_temperature=True, ema_decay=0.0, drift_interval=0, rollouts=None
    )
    before, _ = update_temperature(replace(state, step=jnp.asarray(6)), jnp.asarray(0.9), settings)
    sync, clip = update_temperature(replace(state, step=jnp.asarray(7)), jnp.asarray(0.9), settings)
    assert before == pytest.approx(0.1)
    assert sync == pytest.approx(0.1 * np.exp(0.5 * (0.9 - 0.15)))
    assert clip == pytest.approx(0.9)


def test_all_mean_applies_the_weights_of_records():
    values, weights = jnp.asarray([[1.0, 2.0], [3.0, 6.0]]), jnp.asarray([1.0, 3.0])
    np.testing.assert_allclose(all_mean(values), [2.0, 4.0])
    np.testing.assert_allclose(all_mean(values, None, weights), [2.5, 5.0])


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon", "prodigy"])
def test_optimizers_share_no_buffer_with_the_weights(optimizer, make_config):
    """The state is donated to each step, and a buffer can be donated only once."""
    state = set_up(make_config(optimizer=optimizer)).state
    leaves = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size > 1]
    assert len(set(leaves)) == len(leaves)
