"""Counts the steps whose rewards could not be computed, logs them, and stops a run after ten of them in a row."""

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

log = logging.getLogger(__name__)

FALLBACK = "Failed to compute GRPO rewards, falling back to simple loss"
MAX_FAILURES_IN_A_ROW = 10  # steps in a row without rewards after which the run stops


class RewardFallbacks:
    """Counter of the steps that should have computed rewards, but have none.

    Attributes:
        total: number of these steps in the run so far.
    """

    def __init__(self, total: float = 0.0):
        self.total, self._failures_in_a_row = total, 0

    def count(self, metrics_by_step: Sequence[Mapping[str, np.ndarray]], steps_done: int) -> float:
        """Count the steps without rewards, and return the new total.

        Steps in which no rewards were due are skipped. They do not interrupt a series of failures.

        Args:
            metrics_by_step: the metrics of each of the last steps.
            steps_done: number of steps that the run has done, including these.

        Raises:
            FloatingPointError: rewards failed in ten steps in a row.
        """
        for step, metrics in enumerate(metrics_by_step, steps_done - len(metrics_by_step) + 1):
            if "reward_fallbacks" not in metrics:  # no rewards were due
                continue
            failed = float(metrics["reward_fallbacks"])
            self.total += failed
            self._failures_in_a_row = self._failures_in_a_row + 1 if failed else 0
            if failed and "mean_reward" in metrics:
                log.warning("%s at step %d: %s", FALLBACK, step, _describe_cause(metrics))
            if self._failures_in_a_row == MAX_FAILURES_IN_A_ROW:
                raise FloatingPointError(
                    f"{FALLBACK}: at step {step} for the {MAX_FAILURES_IN_A_ROW}th time in a row; "
                    f"{_describe_cause(metrics)}; the last checkpoint is unchanged"
                )
        return self.total


def _describe_cause(metrics: Mapping[str, np.ndarray]) -> str:
    scores = {name: float(value) for name, value in metrics.items() if name.endswith("_score")}
    not_finite = [f"{name} is {value}" for name, value in scores.items() if not math.isfinite(value)]
    if not not_finite:
        return "a step with rewards does not fit the device; lower --train_batch_size or use smaller buckets"
    return (
        f"{', '.join(not_finite)}, expected finite numbers; look at the newest preview: if it is broken, lower "
        "--learning_rate or use --mixed_precision no; if it is not, fix this reward function"
    )
