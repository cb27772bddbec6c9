"""Trackers write metrics to metrics.jsonl, TensorBoard or Weights & Biases; `summarize` averages metrics over steps."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ra_jax.errors import ConfigError, OutputError
from ra_jax.outputs import write_file

METRICS_FILE = "metrics.jsonl"
# Numbers of the held-out data that looks and drift were measured on: only equal ones can be compared. They are no
# curves, so only metrics.jsonl has them.
LOOK_SET, DRIFT_SET = "held_out_set", "held_out_drift_set"
# `summarize` reports the latest value of these metrics, and the mean over the steps of all others.
LATEST_METRICS = ("lr", "velocity_norm_ratio", "kl_to_base", "clip_fraction_at_sync", "policy_temperature")
# Every step measures these metrics. `summarize` does not leave out their values that are NaN or infinite.
ALWAYS_MEASURED = ("train_loss", "grad_norm")


class Tracker(Protocol):
    """Interface of a destination for rows of scalar metrics."""

    def write(self, step: int, row: dict[str, float]) -> None:
        """Record a row of metrics at this step."""

    def close(self) -> None:
        """Write all buffered rows and close the files."""


class JsonLines:
    """`metrics.jsonl`: one flat JSON object for each row, with its `step`.

    If a run resumes, the rows after `first_step` are removed from the file. A run that starts at step 0 replaces the
    file.
    """

    def __init__(self, output_dir: Path, first_step: int):
        path = output_dir / METRICS_FILE
        rows = read_rows(path) if path.exists() and first_step > 0 else []
        earlier_rows = [row for row in rows if row["step"] <= first_step]
        # write_file replaces the old file only when the new one is complete, so that a run killed here keeps its rows.
        write_file(path, "".join(json.dumps(row) + "\n" for row in earlier_rows))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, row: dict[str, float]) -> None:
        """Append the row without the values that are not finite, and flush the file."""
        # JSON has no NaN and no infinity.
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard's event files in `tensorboard/`. If a run resumes, the points after `first_step` are purged."""

    def __init__(self, output_dir: Path, first_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, row: dict[str, float]) -> None:
        """Add one scalar for each metric."""
        for name, value in curves(row).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases.

    Raises:
        ConfigError: the package wandb is not installed.
    """

    def __init__(self, output_dir: Path, first_step: int):
        try:
            import wandb
        except ModuleNotFoundError:
            raise ConfigError(
                "--report_to wandb: the package wandb is not installed; run `pip install wandb`, or use "
                "--report_to tensorboard"
            ) from None
        self._run = wandb.init(project="ra_jax", dir=str(output_dir), name=output_dir.name, resume="allow")

    def write(self, step: int, row: dict[str, float]) -> None:
        """Log the row at this step."""
        self._run.log(curves(row), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_trackers(output_dir: Path, report_to: Sequence[str], first_step: int) -> list[Tracker]:
    """Open the tracker of metrics.jsonl and the trackers that `--report_to` names."""
    trackers = [TRACKERS[name](output_dir, first_step) for name in report_to if name != "none"]
    return [JsonLines(output_dir, first_step), *trackers]


def curves(row: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a row that are curves."""
    return {name: value for name, value in row.items() if name not in (LOOK_SET, DRIFT_SET)}


def read_rows(path: Path) -> list[dict[str, float]]:
    """Read the rows of a metrics.jsonl. An incomplete last line, which a killed run can leave, is ignored.

    Raises:
        OutputError: a line is not a JSON object with an integer `step`. Then no run wrote the file.
    """
    rows = []
    for line_number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not text
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise OutputError(
                f"{path}, line {line_number}: expected a JSON object with an integer 'step', as a run writes it; move "
                "the file, or choose another --output_dir"
            )
        rows.append(row)
    return rows


def summarize(steps: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Reduce the metrics of several steps to one row.

    The row has the latest value of the metrics in `LATEST_METRICS`, and the mean of every other metric over the steps
    that measured it. A value that is not finite counts as not measured. Metrics in `ALWAYS_MEASURED` are the
    exception: if one value is not finite, the mean is not finite either.
    """
    row = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        values = np.asarray([step[name] for step in steps if name in step], np.float64)
        measured = values if name in ALWAYS_MEASURED else values[np.isfinite(values)]
        if measured.size:
            row[name] = float(measured[-1] if name in LATEST_METRICS else measured.mean())
    return row
