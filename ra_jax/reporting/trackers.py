"""Where metrics go: metrics.jsonl, TensorBoard and Weights & Biases; and the arithmetic of speed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ra_jax.errors import ConfigError, OutputError
from ra_jax.outputs import write_file

METRICS_FILE = "metrics.jsonl"
# Measured at single steps: the latest value is reported; everything else is a mean over the steps since the last row.
LATEST = ("lr", "velocity_norm_ratio", "kl_to_base", "clip_fraction_at_sync", "policy_temperature")
ALWAYS = ("train_loss", "grad_norm")


class Tracker(Protocol):
    """Something that takes a row of scalars a step."""

    def write(self, step: int, row: dict[str, float]) -> None:
        """Record the metrics of a row at this step."""

    def close(self) -> None:
        """Write what is left and release the files."""


class JsonLines:
    """`metrics.jsonl`: one flat JSON object a row, with `step`. On resume, rows after `first_step` are dropped."""

    def __init__(self, output_dir: Path, first_step: int):
        path = output_dir / METRICS_FILE
        kept = [row for row in read_rows(path) if row["step"] <= first_step] if path.exists() and first_step else []
        # Beside the earlier rows first: a run that is killed here still has them.
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, row: dict[str, float]) -> None:
        """Append the row and flush it."""
        # JSON has no NaN: what is not finite is left out.
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files in `tensorboard/`; on resume, points after `first_step` are purged."""

    def __init__(self, output_dir: Path, first_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, row: dict[str, float]) -> None:
        """Add one scalar for each metric."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the `wandb` package, which has to be installed."""

    def __init__(self, output_dir: Path, first_step: int):
        try:
            import wandb
        except ModuleNotFoundError:
            raise ConfigError(
                "--report_to wandb: the package wandb is not installed; `pip install wandb`, or report to tensorboard"
            ) from None
        self._run = wandb.init(project="ra_jax", dir=str(output_dir), name=output_dir.name, resume="allow")

    def write(self, step: int, row: dict[str, float]) -> None:
        """Log the row at this step."""
        self._run.log(row, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_trackers(output_dir: Path, report_to: Sequence[str], first_step: int) -> list[Tracker]:
    """metrics.jsonl, and what `--report_to` names."""
    named = [TRACKERS[name](output_dir, first_step) for name in report_to if name != "none"]
    return [JsonLines(output_dir, first_step), *named]


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is passed over.

    Raises:
        OutputError: a line is not a JSON object with `step`, so that no run wrote the file.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not text
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise OutputError(
                f"{path}, line {number}: expected a JSON object with a whole number as 'step', as a run writes it; "
                "move the file, or choose another --output_dir"
            )
        rows.append(row)
    return rows


def summarize(steps: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """One row for several steps' metrics: the mean of each over the steps that measured it, or its latest value.

    What is not finite counts as not measured, but in `ALWAYS`, the metrics that every step has: there it is passed on.
    """
    row = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        values = np.asarray([step[name] for step in steps if name in step], np.float64)
        measured = values if name in ALWAYS else values[np.isfinite(values)]
        if measured.size:
            row[name] = float(measured[-1] if name in LATEST else measured.mean())
    return row
