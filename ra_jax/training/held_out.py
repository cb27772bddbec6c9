"""Judges the weights of a run on held-out data: which checkpoint is the best, and when the run ends early.

Two measurements are made at regular intervals: looks (`looks`) and, with `--max_drift`, drift. The best checkpoint has
the highest `held_out_reward` of all looks at which the drift was within its limit. A run ends early if it drifts too
far, or if `--patience` looks brought no better reward.

Drift is how much worse the model fits clean photos. In long training a reward keeps rising after it has stopped
measuring what people want. The rewards themselves do not show this. Therefore the guard measures the flow loss and the
velocity norm on held-out clean results, for which no rewards are computed. It compares the flow loss with the lowest so
far, and the velocity norm with the base's.
"""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ra_jax.checkpoints import BEST_DIR, complete_steps
from ra_jax.data.loader import Loader
from ra_jax.models.fill_model import Weights
from ra_jax.parallel.partitioner import fetch
from ra_jax.parallel.processes import is_main_process
from ra_jax.reporting.trackers import DRIFT_SET, LOOK_SET, METRICS_FILE, read_rows
from ra_jax.rl.estimators import matching_cache, repeat_rows
from ra_jax.rl.policy import norm_ratio
from ra_jax.training.looks import Looks, batches_number
from ra_jax.training.step.encode import encode
from ra_jax.training.step.objective import Objective
from ra_jax.training.step.state import example_keys, stream_key

log = logging.getLogger(__name__)


NUM_TIMES = 4  # pairs (t, ε) per record, with t from the whole schedule


@dataclass(frozen=True)
class Drift:
    """Drift, as means over held-out clean results.

    Attributes:
        flow_loss: mean_Ω ‖v_θ − v*‖².
        flow_drift: flow_loss divided by the lowest flow loss of the run so far, minus 1. The base's counts, too.
        velocity_norm_ratio: ‖v_θ‖ / ‖v_base‖.
        number: `DriftGuard.number`.
    """

    flow_loss: float
    flow_drift: float
    velocity_norm_ratio: float
    number: int

    def metrics(self) -> dict[str, float]:
        """Return the measurements under their names in metrics.jsonl."""
        names = ("flow_loss", "flow_drift", "velocity_norm_ratio")
        return {f"held_out_{name}": getattr(self, name) for name in names} | {DRIFT_SET: float(self.number)}

    def excess(self, limit: float) -> str | None:
        """Describe the measurement that exceeds the limit (a fraction), for messages; None if both are within it."""
        if not self.flow_drift <= limit:  # written so that NaN exceeds any limit
            return f"the flow loss on held-out results is {self.flow_drift:.1%} above the lowest so far"
        if not self.velocity_norm_ratio <= 1.0 + limit:
            return f"velocity_norm_ratio on held-out results is {self.velocity_norm_ratio:.3f}"
        return None


class DriftGuard:
    """Measures drift on held-out records, always at the same (t, ε).

    Attributes:
        limit: the largest allowed increase, as a fraction (`--max_drift`).
        lowest_loss: the lowest flow loss measured so far; ∞ before the first measurement.
        number: a number that is the same in all runs whose flow losses can be compared.

    Args:
        objective: provides the model and the loss region.
        loader: yields every held-out record once per epoch, with its `result`.
        limit: see above.
        seed: seed for drawing (t, ε).
    """

    def __init__(self, objective: Objective, loader: Loader, *, limit: float, seed: int):
        self.limit, self.lowest_loss = limit, np.inf
        self._batches = list(islice(loader.iterate(0), loader.batches_per_epoch))
        self.number = batches_number(self._batches, ("source", "mask", "reference", "result"), seed)
        self._measure = jax.jit(
            lambda trainable, frozen, batch: _flow_losses_and_norm_ratio(objective, trainable, frozen, batch, seed)
        )

    def measure(self, trainable: Weights, frozen: Weights) -> Drift:
        """Measure the drift of these weights, as means over the held-out records."""
        measurements = [self._measure(trainable, frozen, batch) for batch in self._batches]
        flow_loss, base_flow_loss, velocity_norm_ratio = (
            float(np.concatenate([fetch(x) for x in values]).mean()) for values in zip(*measurements, strict=True)
        )
        # min() with NaN last: a loss that is not finite is never the lowest.
        self.lowest_loss = min(self.lowest_loss, base_flow_loss, flow_loss)
        return Drift(flow_loss, flow_loss / self.lowest_loss - 1.0, velocity_norm_ratio, self.number)


def _flow_losses_and_norm_ratio(objective: Objective, trainable, frozen, batch, seed: int) -> tuple[jax.Array, ...]:
    """Return the flow loss with experts, the flow loss of the base, and the ratio of their velocity norms, each [B]."""
    model = objective.model
    encoded = encode(model, frozen, batch, objective.settings.loss_region)
    keys = example_keys(stream_key(seed, "held-out"), batch["record_id"])
    cache = matching_cache(keys, encoded.clean, encoded.region, count=NUM_TIMES, fraction=1.0)
    gates, _ = model.gates(trainable, encoded.condition)
    condition, gates, region = jax.tree.map(
        lambda leaf: repeat_rows(leaf, NUM_TIMES), (encoded.condition, gates, encoded.region)
    )
    policy, base = objective.policy_and_base_velocity(trainable, frozen, *cache.points(), condition, gates)
    ratio = norm_ratio(policy, base, region).reshape(-1, NUM_TIMES).mean(1)
    return cache.errors(policy).mean(1), cache.errors(base).mean(1), ratio


@dataclass
class Record:
    """The rewards of the looks of a run so far.

    Attributes:
        highest: the highest held_out_reward; −∞ before the first look.
        highest_step: its step.
        looks_since: number of looks after it.
        latest: the latest held_out_reward.
        latest_step: its step; −1 before the first look.
        saved: held_out_reward of the checkpoint in `best/`; −∞ if there is none.
        saved_step: its step.
    """

    highest: float = -math.inf
    highest_step: int = 0
    looks_since: int = 0
    latest: float = -math.inf
    latest_step: int = -1
    saved: float = -math.inf
    saved_step: int = 0

    def add(self, step: int, reward: float) -> None:
        """Count a look. NaN is never the highest."""
        self.latest, self.latest_step = reward, step
        if reward > self.highest:
            self.highest, self.highest_step, self.looks_since = reward, step, 0
        else:
            self.looks_since += 1

    def save(self, step: int, reward: float) -> bool:
        """Return whether a checkpoint with this reward is better than the one in `best/`. If so, note its reward."""
        if not reward > self.saved:
            return False
        self.saved, self.saved_step = reward, step
        return True


@dataclass(frozen=True)
class Judgment:
    """The result of `HeldOut.judge`.

    Attributes:
        metrics: the measurements, for the row of this step.
        is_best: whether the weights are the best so far, so that their checkpoint belongs into `best/`.
        ending: why the run has to end, for messages; None if it goes on.
        drifted: whether the weights have drifted too far, so that they are not worth a checkpoint.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    is_best: bool = False
    ending: str | None = None
    drifted: bool = False


class HeldOut:
    """The held-out measurements of a run, and what follows from them.

    Args:
        looks: removes and scores held-out scenes; None without looks.
        guard: measures drift; None without `--max_drift`.
        patience: number of looks without a better reward that ends the run; None: no number does.
    """

    def __init__(self, looks: Looks | None, guard: DriftGuard | None, patience: int | None):
        self._looks, self._guard, self._patience = looks, guard, patience
        self.record = Record()

    @property
    def chooses_best(self) -> bool:
        """Whether looks score removals, so that there is a best checkpoint."""
        return self._looks is not None and self._looks.are_scored

    def judge(
        self,
        step: int,
        current: Weights,
        removing: Weights,
        frozen: Weights,
        *,
        look_due: bool,
        drift_due: bool,
    ) -> Judgment:
        """Make the measurements that are due after `step` steps.

        Args:
            step: number of steps done.
            current: the trained weights, whose drift is measured.
            removing: the weights that removal uses, which a look judges: the averaged weights if there are any.
            frozen: the frozen weights.
            look_due: whether a look is due. Drift is then measured, too.
            drift_due: whether a measurement of drift is due.
        """
        metrics, excess = {}, None
        if self._guard is not None and (drift_due or look_due):
            drift = self._guard.measure(current, frozen)
            metrics, excess = drift.metrics(), drift.excess(self._guard.limit)
        if excess is not None:
            return Judgment(metrics, ending=f"max_drift = {self._guard.limit:g}: {excess}", drifted=True)
        if self._looks is None or not look_due:
            return Judgment(metrics)
        look = self._looks.take(step, removing, frozen)
        log.info("look at step %d: %s, %.1f s, %s", step, _describe_scores(look), look.seconds, look.preview)
        metrics |= look.metrics()
        if look.reward is None:
            return Judgment(metrics)
        self.record.add(step, look.reward)
        ending = None
        if self._patience is not None and self.record.looks_since >= self._patience:
            ending = f"patience = {self._patience}: no look after step {self.record.highest_step} was better"
        return Judgment(metrics, self.record.save(step, look.reward), ending)

    def restore(self, output: Path, first_step: int) -> None:
        """Restore the state from the rows of metrics.jsonl up to `first_step`, and from `best/`, if a run is resumed.

        Process 0 reads them, and all processes get the same state. A run that starts at step 0 has nothing to restore.
        """
        if first_step == 0:
            return
        values = np.zeros(len(vars(self.record)) + 1)
        if is_main_process():
            file = output / METRICS_FILE  # missing if the run goes on in another folder
            rows = [row for row in read_rows(file) if row["step"] <= first_step] if file.exists() else []
            record = self._replay(rows, complete_steps(output / BEST_DIR))
            number = None if self._guard is None else self._guard.number
            losses = [row["held_out_flow_loss"] for row in rows if row.get(DRIFT_SET, math.nan) == number]
            values = np.asarray([*vars(record).values(), min(losses, default=math.inf)])
        shared = multihost_utils.broadcast_one_to_all(values.view(np.uint8))  # bytes: JAX would round float64
        *record_values, lowest_loss = np.asarray(shared, np.uint8).view(np.float64).tolist()
        kinds = [type(value) for value in vars(Record()).values()]
        self.record = Record(*(kind(value) for kind, value in zip(kinds, record_values, strict=True)))
        if self._guard is not None:
            self._guard.lowest_loss = lowest_loss

    def _replay(self, rows: Sequence[Mapping[str, float]], saved_steps: Collection[int]) -> Record:
        """Return the record of the looks in these rows that can be compared with those of this start."""
        looks = [row for row in rows if "held_out_reward" in row]
        if not self.chooses_best:
            return Record()
        comparable = [row for row in looks if row.get(LOOK_SET) == self._looks.number]
        if len(comparable) < len(looks):
            log.warning(
                "%d of %d looks of the run so far cannot be compared with later ones (other scenes, other settings, or "
                "an earlier version): the best look is sought anew%s",
                len(looks) - len(comparable),
                len(looks),
                f", and replaces {BEST_DIR}/; copy it to keep it" if saved_steps else "",
            )
        return replay(comparable, saved_steps)

    def describe(self) -> str | None:
        """Describe the best look, the latest look and the folder to use, for the end of a run; None without looks."""
        record = self.record
        if record.highest == -math.inf:
            return None
        if record.saved == -math.inf:
            return f"held_out_reward {record.latest:+.3f} at the last look; best/ has no checkpoint"
        return (
            f"best look at step {record.saved_step}: held_out_reward {record.saved:+.3f}, at the last look "
            f"{record.latest:+.3f}; the checkpoint of the best look is in {BEST_DIR}/"
        )


def replay(looks: Iterable[Mapping[str, float]], saved_steps: Collection[int]) -> Record:
    """Return the record of a run with the looks of these rows, and with checkpoints of these steps in `best/`."""
    record = Record()
    for row in looks:
        record.add(row["step"], row["held_out_reward"])
        if row["step"] in saved_steps:
            record.save(row["step"], row["held_out_reward"])
    return record


def _describe_scores(look) -> str:
    if look.reward is None:
        return "not scored"
    scores = ", ".join(f"{name} {score:.3f}" for name, score in look.scores.items())
    return f"held_out_reward {look.reward:+.3f} ({scores})"
