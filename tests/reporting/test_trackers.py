"""Rows of metrics: how several steps become one row, and which rows remain in the file of a resumed run."""

import numpy as np
import pytest

from ra_jax.reporting import trackers
from ra_jax.reporting.trackers import DRIFT_SET, LOOK_SET, METRICS_FILE, JsonLines, curves, read_rows, summarize


def tracked(folder, first_step, *rows):
    tracker = JsonLines(folder, first_step)
    for step, row in rows:
        tracker.write(step, row)
    tracker.close()
    return read_rows(folder / METRICS_FILE)


def test_a_resumed_run_replaces_the_rows_after_its_checkpoint(tmp_path):
    first = tracked(tmp_path, 0, (1, {"train_loss": 0.1}), (2, {"train_loss": 0.25, "x": float("nan")}), (3, {"x": 1}))
    assert first == [{"step": 1, "train_loss": 0.1}, {"step": 2, "train_loss": 0.25}, {"step": 3, "x": 1}]
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "tr')  # cut short by a kill
    assert tracked(tmp_path, 2, (3, {"x": 2})) == [*first[:2], {"step": 3, "x": 2}]
    assert tracked(tmp_path, 0, (1, {"x": 3})) == [{"step": 1, "x": 3}]


def test_a_run_that_is_killed_as_it_resumes_keeps_its_rows(tmp_path, monkeypatch):
    before = tracked(tmp_path, 0, (1, {"x": 1}), (2, {"x": 2}))

    def killed(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(trackers, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(tmp_path, 1)
    assert read_rows(tmp_path / METRICS_FILE) == before


def test_a_row_holds_means_and_the_latest_measured_values():
    steps = [
        {"train_loss": np.float32(loss), "velocity_norm_ratio": np.float32(drift)}
        for loss, drift in ((1.0, 0.9), (2.0, 1.1), (6.0, np.nan))
    ]
    row = summarize(steps)
    assert row["train_loss"] == 3.0
    np.testing.assert_allclose(row["velocity_norm_ratio"], 1.1, rtol=1e-6)


def test_what_no_step_measured_is_left_out():
    step = {"train_loss": np.float32(1.0), "velocity_norm_ratio": np.float32(np.nan)}
    assert summarize([step]) == {"train_loss": 1.0}


def test_a_loss_that_is_not_finite_stays():
    assert np.isnan(summarize([{"train_loss": np.float32(np.nan)}])["train_loss"])


def test_what_some_steps_measured_is_their_mean():
    """Steps without rewards lack these metrics; steps whose rewards failed have NaN or infinity."""
    steps = [{"mean_reward": np.float32(value)} for value in (1.0, np.nan, 3.0)] + [{"lr": np.float32(1)}]
    steps[1]["my_score"] = np.float32(np.inf)
    assert summarize(steps) == {"mean_reward": 2.0, "lr": 1.0}


def test_numbers_of_held_out_data_are_no_curves(tmp_path):
    row = {"train_loss": 1.0, LOOK_SET: 4e9, DRIFT_SET: 3e9}
    assert curves(row) == {"train_loss": 1.0}
    tracker = JsonLines(tmp_path, 0)
    tracker.write(1, row)
    tracker.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1} | row]
