"""Which photos of a data set are held out, and which held-out scenes are shown and scored during a run."""

import hashlib
from collections.abc import Sequence

import numpy as np

from ra_jax.data.images import ImageFile
from ra_jax.data.packs import PackedImage
from ra_jax.data.records import Record, scene_ids

MIN_PHOTOS = 10  # with fewer photos none is held out


def photo_id(photo: ImageFile) -> str:
    """Return the SHA-256 hash of the file of a photo.

    A pack has the hashes of the files that it was made from. Older packs lack them: then the packed image is hashed,
    which is the same file in a pack without latents.
    """
    packed_id = photo.photo_id if isinstance(photo, PackedImage) else None
    return packed_id or hashlib.sha256(photo.read_bytes()).hexdigest()


def photo_ids(records: Sequence[Record]) -> list[str]:
    """Return the id of each record's photo (`photo_id`). Every file is read once."""
    ids = {photo: photo_id(photo) for photo in dict.fromkeys(record.src for record in records)}
    return [ids[record.src] for record in records]


def split_photos(
    records: Sequence[Record], photos: Sequence[str], fraction: float
) -> tuple[list[Record], list[Record]]:
    """Divide records into records to train on and held-out records, by photo.

    The photos with the smallest ids are held out. The split therefore depends on the photos themselves: it is the same
    on all processes, in resumed runs, with another seed, and if the files are packed, moved or in another order. If
    photos are added, only few of the others change sides.

    Args:
        records: all records.
        photos: id of each record's photo (`photo_ids`). Records of a photo are on the same side, whatever their masks.
        fraction: fraction of the photos to hold out, in [0, 1). If it is above 0, at least one photo is on each side.

    Returns:
        The records to train on, and the held-out records, both in the order of `records`. With fewer than 10 photos, or
        if the fraction is 0, no record is held out.
    """
    distinct = sorted(set(photos))
    if not fraction or len(distinct) < MIN_PHOTOS:
        return list(records), []
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    held_out = set(distinct[:count])
    return (
        [record for record, photo in zip(records, photos, strict=True) if photo not in held_out],
        [record for record, photo in zip(records, photos, strict=True) if photo in held_out],
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
