"""Counts the steps whose rewards could not be computed, logs them, and stops a run after ten of them in a row."""

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

log = logging.getLogger(__name__)

FALLBACK = "Failed to compute GRPO rewards, falling back to simple loss"
LIMIT = 10  # steps in a row


class RewardFallbacks:
    """Counter of the steps in which rewards were due but not available; `total` is their number in the run so far."""

    def __init__(self, total: float = 0.0):
        self.total, self._streak = total, 0

    def count(self, steps: Sequence[Mapping[str, np.ndarray]], done: int) -> float:
        """Count the steps without rewards among `steps`, whose last one is step number `done`; return the new total.

        Steps for which no rewards were due are skipped: they neither count nor end a series.

        Raises FloatingPointError after ten steps in a row without rewards.
        """
        for number, step in enumerate(steps, done - len(steps) + 1):
            if "reward_fallbacks" not in step:  # no rewards were due
                continue
            failed = float(step["reward_fallbacks"])
            self.total += failed
            self._streak = self._streak + 1 if failed else 0
            if failed and "mean_reward" in step:
                log.warning("%s at step %d: %s", FALLBACK, number, _describe_cause(step))
            if self._streak == LIMIT:
                raise FloatingPointError(
                    f"{FALLBACK}: at step {number} for the {LIMIT}th time in a row; {_describe_cause(step)}; the last "
                    "checkpoint is unchanged"
                )
        return self.total


def _describe_cause(step: Mapping[str, np.ndarray]) -> str:
    scores = {name: float(value) for name, value in step.items() if name.endswith("_score")}
    not_finite = [f"{name} is {value}" for name, value in scores.items() if not math.isfinite(value)]
    if not not_finite:
        return "a step with rewards does not fit the device; lower --train_batch_size or use smaller buckets"
    return (
        f"{', '.join(not_finite)}, expected finite numbers; look at the newest preview: if it is broken, lower "
        "--learning_rate or use --mixed_precision no; if it is not, fix that reward function"
    )
