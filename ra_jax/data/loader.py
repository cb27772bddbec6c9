"""Batches for a training step: the global plan's rows, loaded ahead by Grain's threads.

Batch i is a pure function of (seed, i): the position in the data is one number, on however many processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

import grain
import numpy as np
from PIL import Image

from ra_jax.data.images import UNREADABLE, Size
from ra_jax.data.masks import augment_mask
from ra_jax.data.packs import LATENTS, Encoding, PackedPicture
from ra_jax.data.panels import PanelCache, Panels, load_mask, load_panels, nearest_bucket
from ra_jax.data.plan import MASK_STREAM, batches_per_epoch, epoch_plan, random_generator
from ra_jax.data.records import Record, scene_ids
from ra_jax.errors import DataError

CACHE_BYTES = 512 * 2**20
OWN_KEYS = frozenset(
    {"source", "result", "reference", "mask", "redux_pixels", "masked_latents", "image_tokens", "result_latents"}
    | {"group_id", "record_id", "epoch", "condition_weight"}
)
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


class Loader:
    """Endless batches of records, in the order of the epochs' global plans.

    A batch is a dict of arrays, B rows of the global batch:

        source, result, reference   [B, h, w, 3] uint8; `result` only where the records have one
        mask                        [B, h, w] uint8, 1 = remove
        redux_pixels                [B, ...] float32, with `preprocess_reference`, of the reference panel
        masked_latents, image_tokens, result_latents  [B, N, 4C], [B, T, D], [B, N, 4C] with `latents`, where the
                                    pack has them; then no redux_pixels
        group_id, record_id, epoch  [B] int32: `scene_ids`, the position in `records`, the epoch
        condition_weight            [B] float32, 1 / (rows of the record's group in the global batch)
        and the `extras`            [B, ...]

    All records of a group have the same crop, and in an epoch the same augmented mask.

    Args:
        batch_size: records of a global batch.
        rows: which of them this process reads, and in which order (None: all).
        buckets: panel sizes (h, w) in pixels, sides divisible by `multiple`; see `panels.nearest_bucket`.
        latents: the records are of a pack with latents, which are loaded.
        photos: load source, reference and result; a step on latents alone does without.
        augment_masks: enlarge masks at random (`masks.augment_mask`), keyed by (seed, epoch,
            group). A reference that is made from the mask is made from the one in the file.
        extras: values per record, [len(records), ...], put into the batch under their names.
        workers: threads that load batches ahead; 0 loads them when asked.
        cache_bytes: decoded panels kept in memory.

    Raises:
        DataError: no records, results in some records only, bucket sides that `multiple` does not divide.
        ValueError: rows that a batch does not have, extras of another length or a name in use, latents of masks that
            are augmented or of records without, neither photos nor latents.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        batch_size: int,
        buckets: Sequence[Size],
        seed: int,
        multiple: int,
        augment_masks: bool,
        preprocess_reference: Callable[[Image.Image], np.ndarray] | None,
        extras: Mapping[str, np.ndarray],
        rows: Sequence[int] | None = None,
        latents: bool = False,
        photos: bool = True,
        workers: int = 2,
        cache_bytes: int = CACHE_BYTES,
    ):
        check_records(records)
        check_buckets(buckets, multiple)
        _check_extras(extras, len(records))
        _check_rows(rows, batch_size)
        if latents and (augment_masks or encoding_of(records) is None):
            raise ValueError("latents: expected masks as they are, and records of a pack with latents")
        if not (photos or latents):
            raise ValueError("photos and latents are both off: expected one of them to load")
        self._records, self._buckets, self._seed = list(records), tuple(buckets), seed
        self._augment_masks, self._latents, self._photos = augment_masks, latents, photos
        self._preprocess = None if latents else preprocess_reference
        self._extras = dict(extras)
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._workers, self._cache = workers, PanelCache(cache_bytes)
        self._scenes = scene_ids(records)
        record_buckets = np.array([nearest_bucket(record.size, buckets) for record in records], np.int32)
        self.batches_per_epoch = batches_per_epoch(record_buckets, batch_size)
        # A few epochs: workers that run ahead in a small data set are not all in the same one.
        self._plan = lru_cache(maxsize=8)(
            lambda epoch: epoch_plan(self._scenes, record_buckets, batch_size=batch_size, seed=seed, epoch=epoch)
        )

    def iterate(self, start_batch: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Batches start_batch, start_batch + 1, ... for ever; a Grain iterator, close() ends its threads."""
        ahead = grain.ReadOptions(num_threads=self._workers, prefetch_buffer_size=max(2, self._workers))
        if not self._workers:
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
        record, bucket, group = self._records[at], self._buckets[plan.buckets[batch]], int(self._scenes[at])
        try:
            example = self._pictures(record, bucket)
        except UNREADABLE as error:
            error.add_note(
                f"while loading record {record.index} (id {record.id!r}), which was sound when the run began"
            )
            raise
        if self._augment_masks:
            generator = random_generator(self._seed, MASK_STREAM, epoch, group)
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
        if not self._photos:
            return {"mask": load_mask(record, bucket, self._cache)} | _packed_latents(record)
        panels = load_panels(record, bucket, self._cache)
        pictures = {"source": panels.source, "reference": panels.reference, "mask": panels.mask}
        if panels.result is not None:
            pictures["result"] = panels.result
        if self._preprocess is not None:
            pictures["redux_pixels"] = self._redux_pixels(record, bucket, panels)
        return pictures | (_packed_latents(record) if self._latents else {})

    def _redux_pixels(self, record: Record, bucket: Size, panels: Panels) -> np.ndarray:
        def preprocess() -> np.ndarray:
            return np.array(self._preprocess(Image.fromarray(panels.reference)), np.float32)

        return self._cache.get(("redux", record.ref, record.src, record.mask, bucket), preprocess)


def encoding_of(records: Sequence[Record]) -> Encoding | None:
    """How the latents of these records' pack were made; None without a pack, or without latents in it."""
    source = records[0].src
    return source.pack.encoding if isinstance(source, PackedPicture) else None


def _packed_latents(record: Record) -> dict[str, np.ndarray]:
    examples = [record.src.example()] + ([] if record.result is None else [record.result.example()])
    return {name: example[name] for example in examples for name in LATENTS if name in example}


def check_records(records: Sequence[Record]) -> None:
    if not records:
        raise DataError("no records: expected at least one")
    without = [record.id for record in records if record.result is None]
    if 0 < len(without) < len(records):
        named = ", ".join(without[:5]) + (", …" if len(without) > 5 else "")
        raise DataError(f"{len(without)} of {len(records)} records have no result ({named}): expected all or none")


def check_buckets(buckets: Sequence[Size], multiple: int) -> None:
    for bucket in buckets:
        if any(side % multiple for side in bucket):
            fitting = ",".join(str(max(1, round(side / multiple)) * multiple) for side in bucket)
            raise DataError(
                f"aspect_ratio_buckets: {bucket[0]},{bucket[1]} has a side that is no multiple of {multiple} "
                f'pixels (one token of this model); the nearest that fits is "{fitting}"'
            )


def _check_extras(extras: Mapping[str, np.ndarray], count: int) -> None:
    for name, values in extras.items():
        if name in OWN_KEYS:
            raise ValueError(f"extras[{name!r}]: a batch has that key itself; choose another name")
        if len(values) != count:
            raise ValueError(f"extras[{name!r}] has {len(values)} values: expected one a record, {count}")


def _check_rows(rows: Sequence[int] | None, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    if rows is not None and (len(rows) == 0 or min(rows) < 0 or max(rows) >= batch_size):
        raise ValueError(f"rows {list(rows)[:8]}: expected some of 0 to {batch_size - 1}, the rows of a global batch")
