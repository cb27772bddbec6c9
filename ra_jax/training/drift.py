"""The guard of `--max_drift`: stops a run that leaves what clean photos look like, and keeps its best checkpoint.

A reward rises past the point where it still measures what people want. What gives that away is measured where no reward
was given: on held-out clean results, how well the model still knows them, and how long its velocity has grown.
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
from ra_jax.rl.estimators import matching_cache, repeat
from ra_jax.training.step.encode import encode
from ra_jax.training.step.objective import Objective, norm_ratio
from ra_jax.training.step.state import example_keys, stream_key

log = logging.getLogger(__name__)

NUM_TIMES = 4  # (t, ε) of each record, over all of time


@dataclass(frozen=True)
class Drift:
    """flow_loss: mean_Ω ‖v_θ − v*‖² on held-out clean results; flow_drift: how much larger it is than the base's, as a
    fraction; velocity_norm_ratio: the mean of ‖v_θ‖ / ‖v_base‖ there."""

    flow_loss: float
    flow_drift: float
    velocity_norm_ratio: float

    def metrics(self) -> dict[str, float]:
        """The measurements by the names that metrics.jsonl has for them."""
        return {f"held_out_{name}": value for name, value in vars(self).items()}

    def excess(self, limit: float) -> str | None:
        """What is beyond the limit, in words; None where nothing is."""
        if not self.flow_drift <= limit:  # NaN is beyond any limit
            return f"the flow loss on held-out results is {self.flow_drift:+.1%} from the base's"
        if not self.velocity_norm_ratio <= 1.0 + limit:
            return f"velocity_norm_ratio is {self.velocity_norm_ratio:.3f}"
        return None


class DriftGuard:
    """Measures drift on held-out records, always at the same (t, ε), and remembers the best of a run.

    loader: yields each held-out record once an epoch, with its `result`; limit: `--max_drift`.
    """

    def __init__(self, objective: Objective, loader: Loader, *, limit: float, seed: int):
        self.limit, self.best_score = limit, -np.inf
        self._batches = list(islice(loader.iterate(0), loader.batches_per_epoch))
        self._measure = jax.jit(
            lambda trainable, frozen, batch: _errors_and_norms(objective, trainable, frozen, batch, seed)
        )

    def measure(self, trainable: Weights, frozen: Weights) -> Drift:
        """Drift of these weights; means over the held-out records."""
        found = [self._measure(trainable, frozen, batch) for batch in self._batches]
        policy, base, ratio = (
            float(np.concatenate([fetch(x) for x in values]).mean()) for values in zip(*found, strict=True)
        )
        return Drift(policy, policy / base - 1.0, ratio)

    def is_best(self, drift: Drift, row: Mapping[str, float], mode: str) -> bool:
        """Whether this is the best so far of what is within the limit: in automatic mode the highest mean reward, which
        a row without rewards does not have, else the lowest flow loss. Then it is remembered as such."""
        score = row.get("mean_reward", -np.inf) if mode == "automatic" else -drift.flow_loss
        if drift.excess(self.limit) or not score > self.best_score:
            return False
        self.best_score = score
        return True

    def restore_best_score(self, rows: Iterable[Mapping[str, float]], mode: str) -> None:
        """Take the best of earlier rows of a run's metrics for its best so far."""
        for row in rows:
            if "held_out_flow_loss" in row:
                held_out = {name: row.get(f"held_out_{name}", np.nan) for name in Drift.__annotations__}
                self.is_best(Drift(**held_out), row, mode)


def _errors_and_norms(objective: Objective, trainable, frozen, batch, seed: int) -> tuple[jax.Array, ...]:
    """Of each record: flow loss of the experts and of the base, and the ratio of their velocities' norms, [B] each."""
    model = objective.model
    encoded = encode(model, frozen, batch, objective.settings.loss_region)
    keys = example_keys(stream_key(seed, "held-out"), batch["record_id"])
    cache = matching_cache(keys, encoded.clean, encoded.region, count=NUM_TIMES, fraction=1.0)
    gates, _ = model.gates(trainable, encoded.condition)
    condition, gates, region = jax.tree.map(
        lambda leaf: repeat(leaf, NUM_TIMES), (encoded.condition, gates, encoded.region)
    )
    policy, base = objective.policy_and_base_velocity(trainable, frozen, *cache.rows(), condition, gates)
    ratio = norm_ratio(policy, base, region).reshape(-1, NUM_TIMES).mean(1)
    return cache.errors(policy).mean(1), cache.errors(base).mean(1), ratio
