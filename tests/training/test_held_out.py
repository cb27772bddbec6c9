"""Held-out measurements: drift, the best checkpoint, the end of a run, and what a resumed run restores."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ra_jax.checkpoints import find_checkpoint
from ra_jax.reporting.trackers import read_rows
from ra_jax.training.held_out import Drift, HeldOut, Record, replay
from ra_jax.training.looks import Look
from ra_jax.training.loop import train
from ra_jax.training.setup import set_up

WITHIN = Drift(flow_loss=0.3, flow_drift=0.01, velocity_norm_ratio=1.0)
TOO_FAR = Drift(flow_loss=0.4, flow_drift=0.3, velocity_norm_ratio=1.0)


@pytest.fixture(scope="module")
def guarded_setup(make_automatic_config, scored_scenes):
    """The set-up of a run with a drift guard on the ground truths of the scenes."""
    return set_up(make_automatic_config(val_json_path=str(scored_scenes / "triplets.json"), max_drift=0.05))


@pytest.fixture
def guard(guarded_setup):
    """The guard of that run, before its first measurement."""
    guard = guarded_setup.held_out._guard
    guard.lowest_loss = math.inf
    return guard


def test_fresh_experts_have_not_drifted_and_others_have(guard, guarded_setup):
    setup = guarded_setup
    fresh = guard.measure(setup.state.trainable, setup.frozen)
    assert fresh.flow_drift == pytest.approx(0.0, abs=1e-6)
    assert fresh.velocity_norm_ratio == pytest.approx(1.0, abs=1e-6)
    moved = guard.measure(jax.tree.map(lambda x: x + 1.0, setup.state.trainable), setup.frozen)
    assert moved.flow_drift == pytest.approx(moved.flow_loss / min(fresh.flow_loss, moved.flow_loss) - 1, abs=1e-6)
    assert abs(moved.flow_loss - fresh.flow_loss) > 0.01 and abs(moved.velocity_norm_ratio - 1) > 0.01


def test_drift_is_measured_against_the_lowest_flow_loss_so_far(guard, guarded_setup):
    fresh = guard.measure(guarded_setup.state.trainable, guarded_setup.frozen)
    guard.lowest_loss = 0.8 * fresh.flow_loss  # as if an earlier measurement had been better
    again = guard.measure(guarded_setup.state.trainable, guarded_setup.frozen)
    assert again.flow_drift == pytest.approx(0.25, rel=1e-4)
    assert guard.lowest_loss == 0.8 * fresh.flow_loss


def test_the_limit_applies_to_both_measurements_and_nan_exceeds_it():
    assert WITHIN.excess(0.05) is None
    assert "6.0% above the lowest so far" in Drift(0.3, 0.06, 1.0).excess(0.05)
    assert "velocity_norm_ratio on held-out results is 1.060" in Drift(0.3, 0.0, 1.06).excess(0.05)
    assert Drift(0.3, 0.0, 0.5).excess(0.05) is None  # a lower norm is allowed
    for broken in (Drift(np.nan, np.nan, 1.0), Drift(0.3, 0.0, np.nan)):
        assert "nan" in broken.excess(0.05)


def scripted(rewards, drifts=None, patience=None):
    """Return held-out measurements whose looks have these rewards, one after another, and whose guard these drifts."""
    rewards, guard = iter(rewards), None
    looks = SimpleNamespace(take=lambda *_: Look({}, next(rewards), 1.0, Path("preview.png")), are_scored=True)
    if drifts is not None:
        drifts = iter(drifts)
        guard = SimpleNamespace(measure=lambda *_: next(drifts), limit=0.05)
    return HeldOut(looks, guard, patience)


def judge_all(held_out, count, **due):
    due = {"look_due": True, "drift_due": False} | due
    return [held_out.judge(step, None, None, None, **due) for step in range(count)]


def test_the_best_look_has_the_highest_reward():
    judgments = judge_all(scripted([-0.4, -0.5, -0.35, math.nan, -0.35, 0.1]), 6)
    assert [judgment.is_best for judgment in judgments] == [True, False, True, False, False, True]
    assert all(judgment.ending is None for judgment in judgments)


def test_a_look_that_has_drifted_too_far_is_never_the_best_and_ends_the_run():
    held_out = scripted([0.1, 0.2], drifts=[WITHIN, TOO_FAR])
    first, second = judge_all(held_out, 2)
    assert first.is_best and first.metrics["held_out_reward"] == 0.1 and first.metrics["held_out_flow_drift"] == 0.01
    assert not second.is_best and second.drifted and "max_drift = 0.05: the flow loss" in second.ending
    assert "best look at step 0: held_out_reward +0.100" in held_out.describe()


def test_drift_is_measured_between_looks_as_well():
    held_out = scripted([], drifts=[WITHIN, TOO_FAR])
    assert [j.drifted for j in judge_all(held_out, 2, look_due=False, drift_due=True)] == [False, True]
    assert judge_all(scripted([], drifts=[]), 1, look_due=False)[0].metrics == {}


def test_patience_ends_the_run_after_that_many_looks_without_a_better_one():
    judgments = judge_all(scripted([0.0, 0.1, 0.1, 0.05, 0.2], patience=2), 4)
    assert [judgment.ending for judgment in judgments[:3]] == [None] * 3
    assert judgments[3].ending == "patience = 2: no look after step 1 was better"
    assert not judgments[3].drifted


ROWS = [
    {"step": 0, "held_out_reward": 0.0},
    {"step": 1, "train_loss": 1.0},
    {"step": 2, "held_out_reward": 0.3},
    {"step": 4, "held_out_reward": 0.2},
    {"step": 6, "held_out_reward": 0.25},
]


def test_the_record_of_a_run_is_replayed_from_its_rows():
    record = replay(ROWS, saved_steps=[2])
    assert record == Record(highest=0.3, highest_step=2, looks_since=2, latest=0.25, saved=0.3, saved_step=2)


def test_a_best_checkpoint_that_was_lost_is_replaced_by_the_next_look():
    """A checkpoint of a later step was in best/. The run resumed before it, and forgot it."""
    record = replay(ROWS, saved_steps=[])
    assert record.looks_since == 2 and record.saved == -math.inf
    assert record.save(8, 0.1) and not record.save(10, 0.1)


def test_a_resumed_run_restores_its_record_and_its_lowest_loss(tmp_path):
    rows = [row | {"held_out_flow_loss": 0.5 - 0.01 * row["step"]} for row in ROWS] + [
        {"step": 7, "held_out_reward": 9.0, "held_out_flow_loss": 0.1}
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "best" / "2").mkdir(parents=True)
    held_out = scripted([0.1], drifts=[WITHIN], patience=3)
    held_out.restore(tmp_path, first_step=6)
    assert held_out.record == replay(ROWS, [2])
    assert held_out._guard.lowest_loss == pytest.approx(0.44)
    assert held_out.judge(8, None, None, None, look_due=True, drift_due=False).ending.startswith("patience = 3")


@pytest.fixture(scope="module")
def finished(make_config_in, scored_scenes, tmp_path_factory):
    """The folder of a run of 4 steps that looks at the scenes of another data set after every second step."""
    config = make_config_in(
        tmp_path_factory.mktemp("looks"),
        val_json_path=str(scored_scenes / "triplets.json"),
        validation_steps=2,
        validation_scenes=3,
        num_validation_images=2,
        num_inference_steps=2,
        max_train_steps=4,
        checkpointing_steps=1,
        checkpoints_total_limit=1,
    )
    return train(config), config


def test_the_best_checkpoint_is_kept_beside_the_newest(finished):
    output, _ = finished
    looks = {
        row["step"]: row["held_out_reward"] for row in read_rows(output / "metrics.jsonl") if "held_out_reward" in row
    }
    assert looks.keys() == {0, 2, 4}
    best = max(looks, key=looks.get)
    assert [path.name for path in (output / "best").iterdir()] == [str(best)]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["4"]
    assert find_checkpoint(output).parts[-2:] == ("checkpoints", "4")
    assert find_checkpoint(output, prefer_best=True).parts[-2:] == ("best", str(best))


def test_rows_of_looks_have_the_scores_and_the_cost(finished):
    row = read_rows(finished[0] / "metrics.jsonl")[0]
    assert row.keys() == {"step", "held_out_reward", "look_seconds"} | {
        f"held_out_{name}_score" for name in ("removal", "background", "smoothness")
    }
    weights = {"removal": 0.4, "background": 0.3, "smoothness": 0.3}
    expected = sum(weight * (2 * row[f"held_out_{name}_score"] - 1) for name, weight in weights.items())
    assert row["held_out_reward"] == pytest.approx(expected, abs=1e-5)


def test_drift_beyond_the_limit_stops_the_run_and_keeps_its_best(make_automatic_config, scored_scenes):
    """The weight of the policy loss is a hundred times too large, and the estimator has no fixed point."""
    config = make_automatic_config(
        val_json_path=str(scored_scenes / "triplets.json"),
        policy_estimator="matching",
        policy_temperature=0.1,
        max_drift=0.05,
        drift_steps=1,
        validation_steps=2,
        validation_scenes=2,
        num_inference_steps=2,
        max_train_steps=30,
        policy_loss_weight=100.0,
        negative_advantages="keep",
        learning_rate=0.03,
    )
    output = train(config)
    rows = read_rows(output / "metrics.jsonl")
    assert rows[-1]["step"] < 30
    assert rows[-1]["held_out_flow_drift"] > 0.05 or rows[-1]["held_out_velocity_norm_ratio"] > 1.05
    looks = [row for row in rows if "held_out_reward" in row]
    best = max(looks, key=lambda row: row["held_out_reward"])["step"]
    assert [path.name for path in (output / "best").iterdir()] == [str(best)]
    assert str(rows[-1]["step"]) not in {path.name for path in (output / "checkpoints").iterdir()}
    assert "max_drift = 0.05" in (output / "report.html").read_text()
