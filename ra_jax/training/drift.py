"""Drift guard (`--max_drift`): stops a run whose model no longer fits clean photos, and keeps its best checkpoint.

In long training a reward keeps rising after it has stopped measuring what people want. The rewards themselves do not
show this. Therefore the guard measures the flow loss and the velocity norm on held-out clean results, for which no
rewards are computed, and compares both with the base's.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import jax
import numpy as np

from ra_jax.data.loader import Loader
from ra_jax.models.fill_model import Weights
from ra_jax.parallel.partitioner import fetch
from ra_jax.rl.estimators import matching_cache, repeat_rows
from ra_jax.training.step.encode import encode
from ra_jax.training.step.objective import Objective, norm_ratio
from ra_jax.training.step.state import example_keys, stream_key

log = logging.getLogger(__name__)

NUM_TIMES = 4  # pairs (t, ε) per record, with t from the whole schedule


@dataclass(frozen=True)
class Drift:
    """Drift from the base, as means over held-out clean results.

    Attributes:
        flow_loss: mean_Ω ‖v_θ − v*‖².
        flow_drift: flow_loss divided by the flow loss of the base, minus 1.
        velocity_norm_ratio: ‖v_θ‖ / ‖v_base‖.
    """

    flow_loss: float
    flow_drift: float
    velocity_norm_ratio: float

    def metrics(self) -> dict[str, float]:
        """Return the measurements under their names in metrics.jsonl, which start with `held_out_`."""
        return {f"held_out_{name}": value for name, value in vars(self).items()}

    def excess(self, limit: float) -> str | None:
        """Describe the measurement that exceeds the limit (a fraction), for messages; None if both are within it."""
        if not self.flow_drift <= limit:  # written so that NaN exceeds any limit
            return f"the flow loss on held-out results is {self.flow_drift:.1%} above the base's"
        if not self.velocity_norm_ratio <= 1.0 + limit:
            return f"velocity_norm_ratio on held-out results is {self.velocity_norm_ratio:.3f}"
        return None


class DriftGuard:
    """Measures drift on held-out records, always at the same (t, ε), and keeps the run's best score.

    Args:
        objective: provides the model and the loss region.
        loader: yields every held-out record once per epoch, with its `result`.
        limit: the largest allowed increase over the base, as a fraction (`--max_drift`).
        seed: seed for drawing (t, ε).
    """

    def __init__(self, objective: Objective, loader: Loader, *, limit: float, seed: int):
        self.limit, self.best_score = limit, -np.inf
        self._batches = list(islice(loader.iterate(0), loader.batches_per_epoch))
        self._measure = jax.jit(
            lambda trainable, frozen, batch: _flow_losses_and_norm_ratio(objective, trainable, frozen, batch, seed)
        )

    def measure(self, trainable: Weights, frozen: Weights) -> Drift:
        """Measure the drift of these weights, as means over the held-out records."""
        measurements = [self._measure(trainable, frozen, batch) for batch in self._batches]
        flow_loss, base_flow_loss, velocity_norm_ratio = (
            float(np.concatenate([fetch(x) for x in values]).mean()) for values in zip(*measurements, strict=True)
        )
        return Drift(flow_loss, flow_loss / base_flow_loss - 1.0, velocity_norm_ratio)

    def update_best(self, drift: Drift, row: Mapping[str, float], mode: str) -> bool:
        """Return whether the measured weights are the best so far. If they are, store their score.

        They are the best if their drift is within the limit and their score is the highest so far. In automatic mode
        the score is `mean_reward` of the metrics `row`; a row without `mean_reward` is never the best. In the other
        modes the score is −flow_loss.
        """
        score = row.get("mean_reward", -np.inf) if mode == "automatic" else -drift.flow_loss
        if drift.excess(self.limit) or not score > self.best_score:
            return False
        self.best_score = score
        return True

    def restore_best_score(self, rows: Iterable[Mapping[str, float]], mode: str) -> None:
        """Restore the best score from earlier metrics rows of the run; rows without held-out metrics are skipped."""
        for row in rows:
            if "held_out_flow_loss" in row:
                measurements = {name: row.get(f"held_out_{name}", np.nan) for name in Drift.__annotations__}
                self.update_best(Drift(**measurements), row, mode)


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
