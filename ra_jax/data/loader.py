"""Batches for a training step: the global plan's rows, loaded ahead by Grain's threads.

Batch i is a pure function of (seed, i): the position in the data is one number, on however many processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import grain
import numpy as np
from PIL import Image

from ra_jax.data.batch import LATENTS, LOADED
from ra_jax.data.images import UNREADABLE, Size
from ra_jax.data.masks import augment_mask
from ra_jax.data.packs import Encoding, PackedPicture
from ra_jax.data.panels import PanelCache, Panels, load_mask, load_panels, nearest_bucket
from ra_jax.data.plan import MASK_STREAM, batches_per_epoch, epoch_plan, random_generator
from ra_jax.data.records import Record, scene_ids
from ra_jax.errors import DataError

CACHE_BYTES = 512 * 2**20
_ENDLESS = 2**62  # rows; Grain wants a length


def parse_buckets(text: str) -> tuple[Size, ...]:
    """From "h,w;h,w" to ((h, w), (h, w)), the sizes of one panel in pixels.

    Raises:
        DataError: anything else.
    """
    try:
        buckets = tuple(tuple(int(side) for side in part.split(",")) for part in text.strip(" ;").split(";"))
    except ValueError:
        buckets = ()
    if not buckets or any(len(bucket) != 2 or min(bucket) < 1 for bucket in buckets):
        raise DataError(f'aspect_ratio_buckets "{text}": expected "height,width;height,width", e.g. "512,512;448,576"')
    if len(set(buckets)) < len(buckets):
        raise DataError(f'aspect_ratio_buckets "{text}": a size stands there twice; expected sizes that differ')
    return buckets


@dataclass(frozen=True)
class LoaderOptions:
    """What a loader makes of records.

    Attributes:
        batch_size: records of a global batch.
        buckets: panel sizes (h, w) in pixels, sides divisible by `multiple`; see `panels.nearest_bucket`.
        seed: of the order of records and the augmented masks.
        multiple: pixels a side of a token.
        augment_masks: enlarge masks at random (`masks.augment_mask`), keyed by (seed, epoch, group). A reference that
            is made from the mask is made from the one in the file.
        preprocess_reference: a reference panel -> Redux pixels; None: the batches have no `redux_pixels`.
        rows: which rows of a global batch this process reads, and in which order (None: all).
        latents: the records are of a pack with latents, which are loaded; then no `redux_pixels`.
        photos: load source, reference and result; a step on latents alone does without.
        workers: threads that load batches ahead; 0 loads them when asked.
        cache_bytes: decoded panels kept in memory.

    Raises:
        DataError: bucket sides that `multiple` does not divide.
        ValueError: rows that a batch does not have, latents of masks that are augmented, neither photos nor latents.
    """

    batch_size: int
    buckets: Sequence[Size]
    seed: int
    multiple: int
    augment_masks: bool = False
    preprocess_reference: Callable[[Image.Image], np.ndarray] | None = None
    rows: Sequence[int] | None = None
    latents: bool = False
    photos: bool = True
    workers: int = 0
    cache_bytes: int = CACHE_BYTES

    def __post_init__(self):
        check_buckets(self.buckets, self.multiple)
        _check_rows(self.rows, self.batch_size)
        if self.latents and self.augment_masks:
            raise ValueError("latents: expected masks as they are, since a pack has their latents; got augment_masks")
        if not (self.photos or self.latents):
            raise ValueError("photos and latents are both off: expected one of them to load")


class Loader:
    """Endless batches of records, in the order of the epochs' global plans.

    A batch has the keys of `batch.LOADED` and the `extras`, with B rows of the global batch. All records of a group
    have the same crop, and in an epoch the same augmented mask.

    Args:
        records: of a data set.
        options: what is made of them.
        extras: values per record, [len(records), ...], put into the batch under their names.

    Raises:
        DataError: no records, or results in some records only.
        ValueError: extras of another length or with a name of `batch.LOADED`, `latents` of records without.
    """

    def __init__(
        self, records: Sequence[Record], options: LoaderOptions, *, extras: Mapping[str, np.ndarray] | None = None
    ):
        check_results(records)
        self._extras = dict(extras or {})
        _check_extras(self._extras, len(records))
        if options.latents and pack_encoding(records) is None:
            raise ValueError("latents: expected records of a pack with latents")
        self._records, self._options = list(records), options
        batch_size, buckets = options.batch_size, options.buckets
        self._rows = np.arange(batch_size) if options.rows is None else np.asarray(options.rows)
        self._cache = PanelCache(options.cache_bytes)
        self._scenes = scene_ids(records)
        record_buckets = np.array([nearest_bucket(record.size, buckets) for record in records], np.int32)
        self.batches_per_epoch = batches_per_epoch(record_buckets, batch_size)
        # A few epochs: workers that run ahead in a small data set are not all in the same one.
        self._plan = lru_cache(maxsize=8)(
            lambda epoch: epoch_plan(
                self._scenes, record_buckets, batch_size=batch_size, seed=options.seed, epoch=epoch
            )
        )

    def iterate(self, start_batch: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Batches start_batch, start_batch + 1, ... for ever; a Grain iterator, close() ends its threads."""
        workers = self._options.workers
        ahead = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(2, workers))
        if not workers:
            ahead = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        rows = grain.MapDataset.range(start_batch * len(self._rows), _ENDLESS).map(self._example)
        return iter(rows.batch(len(self._rows)).to_iter_dataset(ahead))

    def _example(self, position: int) -> dict[str, np.ndarray]:
        """Row `position` of this process, counted through all batches."""
        batch, row = divmod(position, len(self._rows))
        epoch, batch = divmod(batch, self.batches_per_epoch)
        plan = self._plan(epoch)
        row = self._rows[row]
        at = int(plan.rows[batch, row])
        record, bucket, group = self._records[at], self._options.buckets[plan.buckets[batch]], int(self._scenes[at])
        try:
            example = self._pictures(record, bucket)
        except UNREADABLE as error:
            error.add_note(
                f"while loading record {record.index} (id {record.id!r}), which was sound when the run began"
            )
            raise
        if self._options.augment_masks:
            generator = random_generator(self._options.seed, MASK_STREAM, epoch, group)
            example["mask"] = augment_mask(example["mask"], generator)
        example |= {
            "group_id": np.int32(group),
            "record_id": np.int32(at),
            "epoch": np.int32(epoch),
            "condition_weight": plan.condition_weight[batch, row],
        }
        return example | {name: values[at] for name, values in self._extras.items()}

    def _pictures(self, record: Record, bucket: Size) -> dict[str, np.ndarray]:
        """Panels and latents of a record, the mask as it is."""
        options = self._options
        if not options.photos:
            return {"mask": load_mask(record, bucket, self._cache)} | _packed_latents(record)
        panels = load_panels(record, bucket, self._cache)
        pictures = {"source": panels.source, "reference": panels.reference, "mask": panels.mask}
        if panels.result is not None:
            pictures["result"] = panels.result
        if options.preprocess_reference is not None and not options.latents:
            pictures["redux_pixels"] = self._redux_pixels(record, bucket, panels)
        return pictures | (_packed_latents(record) if options.latents else {})

    def _redux_pixels(self, record: Record, bucket: Size, panels: Panels) -> np.ndarray:
        def preprocess() -> np.ndarray:
            return np.array(self._options.preprocess_reference(Image.fromarray(panels.reference)), np.float32)

        return self._cache.get(("redux", record.ref, record.src, record.mask, bucket), preprocess)


def pack_encoding(records: Sequence[Record]) -> Encoding | None:
    """How the latents of these records' pack were made; None without a pack, or without latents in it."""
    source = records[0].src
    return source.pack.encoding if isinstance(source, PackedPicture) else None


def _packed_latents(record: Record) -> dict[str, np.ndarray]:
    examples = [record.src.example()] + ([] if record.result is None else [record.result.example()])
    return {name: example[name] for example in examples for name in LATENTS if name in example}


def check_results(records: Sequence[Record]) -> None:
    """Raise DataError where there are no records, or some have results and others none."""
    if not records:
        raise DataError("no records: expected at least one")
    without = [record.id for record in records if record.result is None]
    if 0 < len(without) < len(records):
        named = ", ".join(without[:5]) + (", …" if len(without) > 5 else "")
        raise DataError(f"{len(without)} of {len(records)} records have no result ({named}): expected all or none")


def check_buckets(buckets: Sequence[Size], multiple: int) -> None:
    """Raise DataError for a panel size with a side that `multiple` does not divide."""
    for bucket in buckets:
        if any(side % multiple for side in bucket):
            fitting = ",".join(str(max(1, round(side / multiple)) * multiple) for side in bucket)
            raise DataError(
                f"aspect_ratio_buckets: {bucket[0]},{bucket[1]} has a side that is no multiple of {multiple} "
                f'pixels (one token of this model); the nearest that fits is "{fitting}"'
            )


def _check_extras(extras: Mapping[str, np.ndarray], count: int) -> None:
    for name, values in extras.items():
        if name in LOADED:
            raise ValueError(f"extras[{name!r}]: a batch has that key itself; choose another name")
        if len(values) != count:
            raise ValueError(f"extras[{name!r}] has {len(values)} values: expected one a record, {count}")


def _check_rows(rows: Sequence[int] | None, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    if rows is not None and (len(rows) == 0 or min(rows) < 0 or max(rows) >= batch_size):
        raise ValueError(f"rows {list(rows)[:8]}: expected some of 0 to {batch_size - 1}, the rows of a global batch")
