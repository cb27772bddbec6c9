"""Where metrics go: metrics.jsonl, TensorBoard and Weights & Biases; and the arithmetic of speed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ra_jax.config import ConfigError
from ra_jax.models.flux import FluxConfig

FILE = "metrics.jsonl"
# Measured at single steps: the latest value is reported; everything else is a mean over the steps since the last row.
LATEST = ("lr", "velocity_norm_ratio", "clip_fraction_at_sync", "policy_temperature")


class Tracker(Protocol):
    """Something that takes a row of scalars a step."""

    def write(self, step: int, row: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one flat JSON object a row, with `step`. On resume, rows after `first_step` are dropped."""

    def __init__(self, output_dir: Path, first_step: int):
        path = output_dir / FILE
        kept = [row for row in read_rows(path) if row["step"] <= first_step] if path.exists() and first_step else []
        self._file = path.open("w", encoding="utf-8")
        for row in kept:
            self.write(row.pop("step"), row)

    def write(self, step: int, row: dict[str, float]) -> None:
        # JSON has no NaN: what is not finite is left out.
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files in `tensorboard/`; on resume, points after `first_step` are purged."""

    def __init__(self, output_dir: Path, first_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
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
        self._run.log(row, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_trackers(output_dir: Path, report_to: Sequence[str], first_step: int) -> list[Tracker]:
    """metrics.jsonl, and what `--report_to` names."""
    named = [TRACKERS[name](output_dir, first_step) for name in report_to if name != "none"]
    return [JsonLines(output_dir, first_step), *named]


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def summarise(steps: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """One row for several steps' metrics: the mean of each, or its latest value (`LATEST`) if any step measured it."""
    row = {}
    for name in steps[-1]:
        values = np.asarray([step[name] for step in steps], np.float64)
        if name in LATEST:
            measured = values[np.isfinite(values)]
            if measured.size:
                row[name] = float(measured[-1])
        else:
            row[name] = float(values.mean())
    return row


def forward_flops(config: FluxConfig, image_tokens: int, context_tokens: int) -> float:
    """FLOPs of the transformer's matmuls in one forward pass of one image (2 a multiply-add).

    Per token and block: double 2·(4 + 8)·D² (4D² attention, 8D² MLP), single 2·12·D²; attention 4·S²·D a block.
    """
    d, s = config.inner_dim, image_tokens + context_tokens
    blocks = config.num_layers + config.num_single_layers
    embed = image_tokens * d * (config.in_channels + config.out_channels) + context_tokens * d * (
        config.joint_attention_dim
    )
    return 2.0 * (12.0 * d * d * s * blocks + embed) + 4.0 * s * s * d * blocks


def step_flops(
    forward: float, *, records: int, policy_pairs: int, sync_steps: int, kl: bool, full_fine_tuning: bool
) -> float:
    """Model FLOPs of a training step: what the mathematics needs, neither rematerialisation nor frozen gradients.

    A trained pass costs its forward and the gradient with respect to activations (2×), and the weights' gradient (3×)
    where the whole transformer is trained; experts' own products are not counted. The policy takes `policy_pairs`
    trained passes a record, and as many forward passes by the old policy except at every `sync_steps`-th step; with
    `kl` as many again by the base.
    """
    trained = 3.0 if full_fine_tuning else 2.0
    old = (sync_steps - 1) / sync_steps if policy_pairs else 0.0
    return records * forward * (trained * (1 + policy_pairs) + (old + kl) * policy_pairs)
