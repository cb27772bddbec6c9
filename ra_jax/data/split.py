"""Hold out some of the photos of a data set, for runs without held-out records of their own."""

from collections.abc import Sequence

from ra_jax.data.plan import SPLIT_STREAM, random_generator
from ra_jax.data.records import Record

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
