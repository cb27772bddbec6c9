"""Held-out measurements: drift, the best checkpoint, the end of a run, and what a resumed run restores."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ra_jax.checkpoints import Checkpoints, find_checkpoint, restore
from ra_jax.errors import OutputError
from ra_jax.parallel.partitioning import named_leaves
from ra_jax.reporting.trackers import read_rows
from ra_jax.training.held_out import Drift, HeldOut, Judgment, Record, replay
from ra_jax.training.looks import Look
from ra_jax.training.loop import describe_ending, train
from ra_jax.training.setup import set_up

NUMBER = 7  # of the looks here
WITHIN = Drift(flow_loss=0.3, flow_drift=0.01, velocity_norm_ratio=1.0, number=NUMBER)
TOO_FAR = Drift(flow_loss=0.4, flow_drift=0.3, velocity_norm_ratio=1.0, number=NUMBER)


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
    assert "6.0% above the lowest so far" in Drift(0.3, 0.06, 1.0, NUMBER).excess(0.05)
    assert "velocity_norm_ratio on held-out results is 1.060" in Drift(0.3, 0.0, 1.06, NUMBER).excess(0.05)
    assert Drift(0.3, 0.0, 0.5, NUMBER).excess(0.05) is None  # a lower norm is allowed
    for broken in (Drift(np.nan, np.nan, 1.0, NUMBER), Drift(0.3, 0.0, np.nan, NUMBER)):
        assert "nan" in broken.excess(0.05)


def scripted(rewards, drifts=None, patience=None):
    """Return held-out measurements whose looks have these rewards, one after another, and whose guard these drifts."""
    rewards, guard = iter(rewards), None
    looks = SimpleNamespace(
        take=lambda *_: Look({}, next(rewards), NUMBER, 1.0, Path("preview.png")), are_scored=True, number=NUMBER
    )
    if drifts is not None:
        drifts = iter(drifts)
        guard = SimpleNamespace(measure=lambda *_: next(drifts), limit=0.05, number=NUMBER)
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


LOOKS = [
    {"step": 0, "held_out_reward": 0.0, "held_out_set": NUMBER},
    {"step": 2, "held_out_reward": 0.3, "held_out_set": NUMBER},
    {"step": 4, "held_out_reward": 0.2, "held_out_set": NUMBER},
    {"step": 6, "held_out_reward": 0.25, "held_out_set": NUMBER},
]
ROWS = [LOOKS[0], {"step": 1, "train_loss": 1.0}, *LOOKS[1:]]


def test_the_record_of_a_run_is_replayed_from_its_rows():
    record = replay(LOOKS, saved_steps=[2])
    assert record == Record(
        highest=0.3, highest_step=2, looks_since=2, latest=0.25, latest_step=6, saved=0.3, saved_step=2
    )


def test_a_best_checkpoint_that_was_lost_is_replaced_by_the_next_look():
    record = replay(LOOKS, saved_steps=[])
    assert record.looks_since == 2 and record.saved == -math.inf
    assert record.save(8, 0.1) and not record.save(10, 0.1)


def test_a_resumed_run_restores_its_record_and_its_lowest_loss(tmp_path, make_checkpoint_files):
    rows = [row | {"held_out_flow_loss": 0.5 - 0.01 * row["step"], "held_out_drift_set": NUMBER} for row in ROWS] + [
        {"step": 7, "held_out_reward": 9.0, "held_out_flow_loss": 0.1}
    ]
    rows[0] |= {"held_out_flow_loss": 0.01, "held_out_drift_set": NUMBER + 1}  # of other records
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_checkpoint_files(tmp_path / "best" / "2")
    held_out = scripted([0.1], drifts=[WITHIN], patience=3)
    held_out.restore(tmp_path, first_step=6)
    assert held_out.record == replay(LOOKS, [2])
    assert type(held_out.record.saved_step) is int and "best look at step 2: " in held_out.describe()
    assert held_out._guard.lowest_loss == pytest.approx(0.44)
    assert held_out.judge(8, None, None, None, look_due=True, drift_due=False).ending.startswith("patience = 3")


def test_a_broken_best_checkpoint_does_not_count_as_saved(tmp_path, make_checkpoint_files):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    make_checkpoint_files(tmp_path / "best" / "2")
    (tmp_path / "best/2/about/metadata").unlink()
    held_out = scripted([0.1])
    held_out.restore(tmp_path, first_step=6)
    assert held_out.record == replay(LOOKS, [])
    assert held_out.judge(8, None, None, None, look_due=True, drift_due=False).is_best


def test_a_resumed_run_forgets_looks_that_cannot_be_compared(tmp_path, caplog, make_checkpoint_files):
    """The run looked at other scenes until step 2."""
    rows = [row | {"held_out_set": NUMBER + (row["step"] <= 2)} for row in LOOKS]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_checkpoint_files(tmp_path / "best" / "2")
    held_out = scripted([0.1], patience=3)
    held_out.restore(tmp_path, first_step=6)
    assert held_out.record == replay(LOOKS[2:], [])
    assert "2 of 4 looks of the run so far cannot be compared with later ones" in caplog.text
    assert "and replaces best/; copy it to keep it" in caplog.text
    assert held_out.judge(8, None, None, None, look_due=True, drift_due=False).is_best


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
    assert row.keys() == {"step", "held_out_reward", "held_out_set", "look_seconds"} | {
        f"held_out_{name}_score" for name in ("removal", "background", "smoothness")
    }
    weights = {"removal": 0.4, "background": 0.3, "smoothness": 0.3}
    expected = sum(weight * (2 * row[f"held_out_{name}_score"] - 1) for name, weight in weights.items())
    assert row["held_out_reward"] == pytest.approx(expected, abs=1e-5)


def copy_of(config, folder, **run):
    """The configuration of another run like `config`, in a new folder."""
    return replace(config, run=replace(config.run, output_dir=str(folder / "run"), **run))


def assert_same_end(output, other, setup):
    """Both runs have the same looks and the same last checkpoint, bit for bit."""
    ended = [named_leaves(restore(folder / "checkpoints" / "4", setup.state)) for folder in (output, other)]
    for name in ended[0]:
        np.testing.assert_array_equal(ended[0][name], ended[1][name], err_msg=name)
    looks = [
        {row["step"]: row["held_out_reward"] for row in read_rows(folder / "metrics.jsonl") if "held_out_reward" in row}
        for folder in (output, other)
    ]
    assert looks[0] == looks[1]


def test_a_killed_run_continues_from_a_best_checkpoint_that_is_newer(finished, tmp_path, interrupt_at):
    output, config = finished
    config = copy_of(config, tmp_path, checkpointing_steps=0)
    interrupt_at(3, lambda: train(config))
    best = find_checkpoint(config.run.output_dir)
    assert best.parent.name == "best"
    setup = set_up(copy_of(config, tmp_path, resume_from_checkpoint="latest"))
    assert setup.first_step == int(best.name)
    assert_same_end(train(copy_of(config, tmp_path, resume_from_checkpoint="latest")), output, setup)
    assert find_checkpoint(config.run.output_dir, prefer_best=True).name == find_checkpoint(output / "best").name


@pytest.mark.parametrize("last_step", [2, 4])
def test_a_look_that_sigterm_prevented_is_taken_when_the_run_continues(finished, tmp_path, monkeypatch, last_step):
    """Also if it stopped the run after its last step."""
    output, config = finished
    config = copy_of(config, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("ra_jax.training.loop.should_stop", lambda is_set, steps_done: steps_done == last_step)
        train(config)
    looks = [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl") if "held_out_reward" in row]
    assert looks == list(range(0, last_step, 2))
    config = copy_of(config, tmp_path, resume_from_checkpoint="latest")
    setup = set_up(config)
    assert setup.first_step == last_step
    assert_same_end(train(config), output, setup)
    assert "Time in steps" in (tmp_path / "run/report.html").read_text()  # the row of that look has no duration


def test_looks_are_numbered_by_their_scenes_and_settings(finished, tmp_path):
    _, config = finished
    number = read_rows(finished[0] / "metrics.jsonl")[0]["held_out_set"]

    def number_with(**changes):
        groups = {
            group: replace(settings, **{name: value for name, value in changes.items() if hasattr(settings, name)})
            for group, settings in vars(config).items()
        }
        changed = copy_of(replace(config, **groups), tmp_path, overwrite_output_dir=True)
        return float(set_up(changed).held_out._looks.number)

    assert number_with() == number_with(num_validation_images=1) == number_with(learning_rate=1.0) == number
    changes = ({"validation_scenes": 2}, {"num_inference_steps": 3}, {"guidance_scale": 2.0}, {"seed": 5})
    changes += ({"removal_reward_weight": 0.9}, {"aspect_ratio_buckets": "32,48"})
    assert len({number, *(number_with(**change) for change in changes)}) == 7


@pytest.mark.parametrize(
    ("latest", "expected"),
    [
        (Path("run/best/3"), "these weights are not saved, the latest checkpoint is run/best/3"),
        (Path("run/checkpoints/7"), "the latest checkpoint run/checkpoints/7 has these weights: use an earlier one"),
        (None, "no checkpoint was saved before: lower --checkpointing_steps, or raise --max_drift"),
    ],
)
def test_the_end_of_a_run_that_drifted_names_its_latest_checkpoint(latest, expected):
    judgment = Judgment(ending="max_drift = 0.05: too far", drifted=True)
    ending = describe_ending(7, judgment, SimpleNamespace(latest=lambda: latest))
    assert ending == f"stopped at step 7 by max_drift = 0.05: too far; {expected}"


def fail_to_save(*args, **kwargs):
    """Fail as Orbax does if the disk is full."""
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']")


@pytest.mark.parametrize("method", ["save", "latest"])
def test_a_full_disk_ends_the_run_with_advice_and_a_report(finished, tmp_path, monkeypatch, method):
    """Saves fail when they start, or later, when the run waits for them. The folders cannot be closed, either."""
    closed = []
    monkeypatch.setattr(Checkpoints, method, fail_to_save)
    monkeypatch.setattr(Checkpoints, "close", lambda self: closed.append(self.folder.name) or fail_to_save())
    with pytest.raises(OutputError, match=r"run: the disk is full, .*--resume_from_checkpoint latest"):
        train(copy_of(finished[1], tmp_path))
    assert sorted(closed) == ["best", "checkpoints"]
    assert "stopped by an error: RESOURCE_EXHAUSTED" in (tmp_path / "run/report.html").read_text()


def test_a_full_disk_before_the_first_step_is_explained(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("ra_jax.training.setup.prepare_output_dir", fail_to_save)
    with pytest.raises(OutputError, match=r"run: the disk is full"):
        train(copy_of(finished[1], tmp_path))


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
    report = (output / "report.html").read_text()
    assert "max_drift = 0.05" in report and f"the latest checkpoint is {find_checkpoint(output)}" in report
