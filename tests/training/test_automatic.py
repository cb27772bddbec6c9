"""GRPO on automatic rewards: whole steps and runs."""

import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.checkpoints import find_checkpoint, restore
from ra_jax.errors import CheckpointError, ConfigError, RewardError
from ra_jax.parallel.partitioning import named_leaves
from ra_jax.reporting.trackers import read_rows
from ra_jax.rewards.registry import REWARDS
from ra_jax.training.loop import RunCheckpoints, train
from ra_jax.training.setup import set_up
from ra_jax.training.step.experience import collect_experience
from ra_jax.training.step.train_step import StepDefinition, learn, reduce_metrics

STILL = {"learning_rate": 1e-30, "adam_weight_decay": 0.0}  # too small a step to change any weight


def updates_of(setup, steps=2, drift=0):
    """Take steps; return the state, and for each step the metrics of its updates [updates] and of the step itself."""
    settings = replace(setup.step_settings, drift_interval=drift)
    program = StepDefinition(setup.objective, setup.optimizer, settings)

    @jax.jit
    def step(state, frozen, microbatches):
        experience, measured = collect_experience(
            program.objective, settings, state, frozen, microbatches, jnp.asarray(True)
        )
        state, metrics = learn(program, state, frozen, experience, on_policy=jnp.asarray(True))
        return replace(state, step=state.step + 1), metrics, measured

    state, rows = setup.state, []
    for batch in islice(setup.batches(), steps):
        state, *row = step(state, setup.frozen, batch)
        rows.append(jax.device_get(row))
    return state, rows


def test_a_step_leaves_the_base_and_changes_every_expert_and_the_router(make_automatic_config, find_changed_leaves):
    """The ratio ρ is exactly 1 in the first update, whose weights are the old policy, and not in the second."""
    setup = set_up(make_automatic_config(adam_weight_decay=0.0))
    frozen, before = jax.tree.map(np.array, (setup.frozen, setup.state.trainable))
    state, rows = updates_of(setup, drift=1)
    assert find_changed_leaves(frozen, setup.frozen) == set()
    assert find_changed_leaves(before, state.trainable) == set(named_leaves(before))
    assert state.old_params is None  # the weights before a step are its old policy
    for updates, _ in rows:
        assert updates["mean_ratio"][0] == 1.0 != updates["mean_ratio"][1]
        assert updates["approx_kl"][0] == 0.0 < updates["approx_kl"][1]
    assert rows[0][1]["kl_to_base"] == 0.0 < rows[1][1]["kl_to_base"]
    # The router's running mean is updated once per step, with the gates of the last update. Both conditions have
    # equal weight.
    mean = np.full(3, 1 / 3)
    for updates, _ in rows:
        mean = 0.9 * mean + 0.1 * np.asarray([updates[f"routing_expert_{i}_weight"][-1] for i in range(3)])
    np.testing.assert_allclose(state.router_mean, mean, rtol=1e-5)


def test_a_step_reports_the_ratio_of_its_last_update():
    """The ratio of the first update is always 1."""
    updates = {"mean_ratio": jnp.asarray([1.0, 0.8]), "clip_fraction": jnp.asarray([0.0, 0.5])}
    assert reduce_metrics(updates | {"base_loss": jnp.asarray([1.0, 2.0])}) == {
        "mean_ratio": np.float32(0.8),
        "clip_fraction": 0.5,
        "base_loss": 1.5,
    }


def test_the_sampled_expert_is_part_of_the_ratio_and_trains_the_router(
    make_automatic_config, photo_flags, find_changed_leaves
):
    """The gates are one-hot and the other losses are off, so the router has no other source of gradients."""
    setup = set_up(
        make_automatic_config(routing="sample", diversity_loss_weight=0.0, adam_weight_decay=0.0, **photo_flags)
    )
    before = jax.tree.map(np.array, setup.state.trainable)
    state, rows = updates_of(setup, steps=1)
    assert rows[0][0]["mean_ratio"][0] == 1.0 != rows[0][0]["mean_ratio"][1]
    assert "router/logits/kernel" in find_changed_leaves(before, state.trainable)


@pytest.mark.parametrize(
    ("estimator", "precision", "bound"), [("contrast", "bf16", 1e-3), ("matching", "bf16", 1e-3), ("sde", "no", 1e-6)]
)
def test_equal_parameters_give_equal_log_probabilities(
    make_automatic_config, photo_flags, with_optimizations, estimator, precision, bound
):
    """The second update, whose weights the first did not change, is compared with the old policy of the first."""
    flags = {"policy_estimator": estimator, "mixed_precision": precision, "policy_temperature": 1.0}
    for updates, _ in updates_of(set_up(make_automatic_config(**flags, **STILL, **photo_flags)))[1]:
        assert updates["mean_ratio"][0] == 1.0
        assert abs(np.log(updates["mean_ratio"][1])) <= bound
        assert updates["clip_fraction"][1] == 0.0


def broken(inputs):
    return jnp.full(inputs.image.shape[:1], jnp.nan)


def test_ten_steps_without_rewards_stop_the_run(make_automatic_config, monkeypatch, caplog):
    monkeypatch.setitem(REWARDS, "removal", replace(REWARDS["removal"], function=broken))
    config = make_automatic_config(max_train_steps=14, num_iterations=1, rollout_steps=1)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(
            FloatingPointError, match=r"falling back.*step 10 for the 10th time in a row.*removal_score is nan"
        ),
    ):
        train(config)
    messages = [record.message for record in caplog.records if "falling back to simple loss" in record.message]
    assert len(messages) == 10 and "removal_score is nan" in messages[0]
    assert "lower --learning_rate" in messages[0]
    output = Path(config.run.output_dir)
    rows = read_rows(output / "metrics.jsonl")
    assert rows[-1]["step"] == 9 and rows[-1]["reward_fallbacks"] == 9.0
    assert "falling back" in (output / "report.html").read_text()


def test_a_python_function_as_reward(make_automatic_config, photo_flags, run_steps, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "import numpy as np\n\n\ndef dark(inputs):\n    return 1.0 - np.asarray(inputs.image).mean((1, 2, 3))\n\n\n"
        "def wrong(inputs):\n    return inputs.image\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    setup = set_up(
        make_automatic_config(reward_functions=["my_rewards:dark=0.5", "smoothness=0.5"], log_freq=100, **photo_flags)
    )
    _, rows = run_steps(setup, 1)
    assert 0.0 < rows[0]["dark_score"] < 1.0
    assert rows[0]["mean_reward"] == pytest.approx(
        0.5 * (2 * rows[0]["dark_score"] - 1) + 0.5 * (2 * rows[0]["smoothness_score"] - 1), abs=1e-5
    )
    with pytest.raises(RewardError, match=r"wrong.*\(2, 32, 32, 3\)"):
        set_up(make_automatic_config(reward_functions=["my_rewards:wrong"]))


def test_photos_without_results_train_with_rewards_that_need_none(make_automatic_config, photo_flags):
    """A whole run with the estimator nft, and previews without ground truth."""
    flags = {"max_train_steps": 1, "policy_estimator": "nft", "kl_weight": 0.1}
    output = train(make_automatic_config(validation_steps=1, num_inference_steps=2, **flags, **photo_flags))
    (row,) = read_rows(output / "metrics.jsonl")
    assert "base_loss" not in row
    promised = {"removal_score", "background_score", "smoothness_score", "policy_loss", "kl_loss", "policy_change"}
    assert promised <= row.keys()
    assert (output / "previews" / "step_000001.png").exists()


def test_a_rollout_that_is_too_short_for_its_noisy_steps_is_refused(make_automatic_config):
    with pytest.raises(ConfigError, match=r"rollout_steps = 2 with sde_window = 2.*raise --rollout_steps"):
        set_up(make_automatic_config(policy_estimator="sde", rollout_steps=2))


def test_several_results_of_a_scene_cause_a_warning(make_automatic_config, scored_scenes, caplog):
    with caplog.at_level(logging.WARNING):
        set_up(make_automatic_config(train_json_path=str(scored_scenes / "labeled_dict.json")))
    assert "24 records of 6 scenes" in caplog.text


@pytest.mark.parametrize(("ema_decay", "part"), [(0.0, "trainable"), (0.9, "ema")])
def test_a_run_starts_with_another_runs_experts(
    make_automatic_config, find_changed_leaves, make_config_in, tmp_path, ema_decay, part
):
    """A human-scored run, then an automatic run from its experts, or from their average if the run has one."""
    human = make_config_in(tmp_path / "human", ema_decay=ema_decay)
    trained = set_up(human)
    moved = [jax.tree.map(lambda x, by=by: x + by, trained.state.trainable) for by in (0.1, 0.2)]
    checkpoints = RunCheckpoints(human, trained)
    checkpoints.save(
        1, replace(trained.state, trainable=moved[0], ema=moved[1] if ema_decay else None), regular=True, best=False
    )
    checkpoints.close()
    setup = set_up(make_automatic_config(init_experts_from=human.run.output_dir))
    assert find_changed_leaves({"trainable": moved[0], "ema": moved[1]}[part], setup.state.trainable) == set()
    assert int(setup.state.step) == 0


def test_initial_experts_without_a_checkpoint_are_refused(make_automatic_config, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        set_up(make_automatic_config(init_experts_from=str(tmp_path)))


@pytest.mark.slow
def test_an_interrupted_run_resumes_bit_for_bit(make_automatic_config, find_changed_leaves, interrupt_at):
    """The run has rewards at every other step, sampled experts, averaged weights, several updates and a schedule."""
    flags = {"routing": "sample", "reward_interval": 2, "ema_decay": 0.9, "lr_scheduler": "cosine"}
    flags |= {"max_train_steps": 4, "checkpointing_steps": 2}
    straight, stopped = make_automatic_config(**flags), make_automatic_config(**flags)
    train(straight)
    interrupt_at(3, lambda: train(stopped))
    resumed = replace(stopped, run=replace(stopped.run, resume_from_checkpoint="latest"))
    train(resumed)
    like = set_up(resumed).state
    ended = [restore(find_checkpoint(config.run.output_dir), like) for config in (resumed, straight)]
    assert find_changed_leaves(*ended) == set()
