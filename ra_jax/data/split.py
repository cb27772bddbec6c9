"""Which photos of a data set are held out, and which held-out scenes are shown and scored during a run."""

from collections.abc import Sequence

import numpy as np

from ra_jax.data.plan import SPLIT_STREAM, random_generator
from ra_jax.data.records import Record, scene_ids

MIN_PHOTOS = 10  # with fewer photos none is held out


def split_photos(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Divide records into records to train on and held-out records, by photo.

    All records of a photo are on the same side, also if they have different masks. The split is a pure function of the
    records, the fraction and the seed, so that all processes and a resumed run make the same one. Both sides keep the
    order of the records.

    Args:
        records: all records.
        fraction: fraction of the photos to hold out, in [0, 1); at least one photo is held out if it is above 0.
        seed: seed of the run.

    Returns:
        The records to train on, and the held-out records. With fewer than 10 photos, or if the fraction is 0, no record
        is held out.
    """
    photos = list(dict.fromkeys(record.src for record in records))
    if not fraction or len(photos) < MIN_PHOTOS:
        return list(records), []
    order = random_generator(seed, SPLIT_STREAM).permutation(len(photos))
    held_out = {photos[i] for i in order[: max(1, round(fraction * len(photos)))]}
    return (
        [record for record in records if record.src not in held_out],
        [record for record in records if record.src in held_out],
    )


def choose_scenes(records: Sequence[Record], score_weights: Sequence[float], count: int) -> list[Record]:
    """Choose at most `count` scenes, evenly spread over the data, and return the best record of each.

    The best record shows the ground truth, or else has the highest weighted sum of scores. Its result is shown in
    previews.
    """
    scenes = scene_ids(records)
    distinct = np.unique(scenes)

    def rank(i: int) -> tuple[bool, float]:
        scores = records[i].scores
        return shows_truth(records[i]), 0.0 if scores is None else float(np.dot(scores, score_weights))

    chosen_scenes = distinct[spread(len(distinct), count)]
    return [records[max(np.flatnonzero(scenes == scene), key=rank)] for scene in chosen_scenes]


def spread(total: int, count: int) -> np.ndarray:
    """Return at most `count` of the indices 0 … total − 1, evenly spread and in order."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def shows_truth(record: Record) -> bool:
    """Return whether the record's result is the ground truth: its source says so, or nobody scored it."""
    return record.result is not None and (record.source == "gt" or (record.scores is None and record.source is None))
