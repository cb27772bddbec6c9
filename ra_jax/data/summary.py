"""Summarize a data set for `python -m ra_jax.data validate`."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from ra_jax.data.records import Record, scene_ids
from ra_jax.data.scores import SCORE_NAMES

BINS = 10


def format_summary(records: Sequence[Record]) -> str:
    """Return a text with the counts of records and scenes, and a histogram of each score in steps of 0.1.

    The scenes are also counted by their number of results.
    """
    scenes = scene_ids(records)
    scenes_by_size = Counter(np.bincount(scenes).tolist()) if len(scenes) else {}
    rows = [("records", len(records)), ("scenes", sum(scenes_by_size.values()))]
    rows += [(f"  of {size} result{'s' * (size > 1)}", count) for size, count in sorted(scenes_by_size.items())]
    lines = [f"{name:<16}{count:>8}" for name, count in rows]
    scores = np.array([record.scores for record in records if record.scores is not None])
    if not len(scores):
        return "\n".join([*lines, f"{'scored records':<16}{0:>8}"])
    edges = "".join(f"{f'≥{i / BINS:.1f}':>6}" for i in range(BINS))
    lines += ["", f"{'score':<18}{'records':>8}{'mean':>8}{'std':>8}  {edges}"]
    lines += [_score_row(name, values) for name, values in zip(SCORE_NAMES, scores.T, strict=True)]
    return "\n".join(lines)


def _score_row(name: str, values: np.ndarray) -> str:
    counts: Iterable[int] = np.histogram(values, bins=BINS, range=(0.0, 1.0))[0]
    histogram = "".join(f"{count:>6}" for count in counts)
    return f"{name:<18}{len(values):>8}{values.mean():>8.3f}{values.std():>8.3f}  {histogram}"
