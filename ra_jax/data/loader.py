"""Load batches for training steps: rows of the global plan, read ahead by Grain's threads.

Batch i is a pure function of (seed, i). The position in the data is therefore a single number, for any number of
processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import grain
import numpy as np
from PIL import Image

from ra_jax.data.batch import LATENT_KEYS, LOADED_FIELDS
from ra_jax.data.images import UNREADABLE_ERRORS, Size
from ra_jax.data.masks import augment_mask
from ra_jax.data.packs import LatentEncoding, PackedImage
from ra_jax.data.panels import PanelCache, Panels, load_mask, load_panels, nearest_bucket
from ra_jax.data.plan import MASK_STREAM, batches_per_epoch, epoch_plan, random_generator
from ra_jax.data.records import Record, scene_ids
from ra_jax.errors import DataError

CACHE_BYTES = 512 * 2**20
_ENDLESS = 2**62  # number of rows of an endless data set; Grain requires a finite number


def parse_buckets(text: str) -> tuple[Size, ...]:
    """Parse "h,w;h,w" to ((h, w), (h, w)), the sizes of one panel in pixels.

    Raises:
        DataError: the text does not have this form, or a size occurs twice.
    """
    try:
        buckets = tuple(tuple(int(side) for side in part.split(",")) for part in text.strip(" ;").split(";"))
    except ValueError:
        buckets = ()
    if not buckets or any(len(bucket) != 2 or min(bucket) < 1 for bucket in buckets):
        raise DataError(f'aspect_ratio_buckets "{text}": expected "height,width;height,width", e.g. "512,512;448,576"')
    if len(set(buckets)) < len(buckets):
        raise DataError(f'aspect_ratio_buckets "{text}": a size is listed twice; expected different sizes')
    return buckets


@dataclass(frozen=True)
class LoaderOptions:
    """Options of a loader.

    Attributes:
        batch_size: number of records in a global batch.
        buckets: panel sizes (h, w) in pixels, sides divisible by `multiple`; see `panels.nearest_bucket`.
        seed: seed of the order of records and of the augmented masks.
        multiple: side of a token in pixels.
        augment_masks: enlarge masks at random (`masks.augment_mask`). The result depends on (seed, epoch, scene). If a
            reference is made from the mask, it is made from the original mask.
        preprocess_reference: converts a reference panel to the pixels that Redux encodes. If None, batches have no
            `redux_pixels`.
        rows: rows of a global batch that this process reads, in this order; None for all rows.
        latents: load latents and image tokens from the pack. Batches then have no `redux_pixels`.
        file_masks: also yield the masks before they are augmented, as `file_mask`.
        photos: load source, reference and result. A step that uses only latents does not need them.
        workers: number of threads that load batches ahead. With 0, each batch is loaded when it is requested.
        cache_bytes: size of the cache of decoded panels in bytes.

    Raises:
        DataError: a bucket side is not divisible by `multiple`.
        ValueError: `batch_size` is below 1, a row is outside the batch, `latents` and `augment_masks` are both True, or
            `photos` and `latents` are both False.
    """

    batch_size: int
    buckets: Sequence[Size]
    seed: int
    multiple: int
    augment_masks: bool = False
    file_masks: bool = False
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
            raise ValueError(
                "latents=True with augment_masks=True: a pack has latents for the original masks only; "
                "set augment_masks=False"
            )
        if not (self.photos or self.latents):
            raise ValueError("photos=False and latents=False: expected at least one of them to be True")


class Loader:
    """Endless iteration over batches of records, in the order of the global plan of each epoch.

    A batch has keys of `batch.LOADED_FIELDS`, and all keys of `extras`. It holds this process's rows of the global
    batch. All records of a scene have the same crop. Within an epoch, they also have the same augmented mask.

    Args:
        records: records of a data set.
        options: options of the loader.
        extras: additional arrays by key, with one row for each record. Batches contain them under the same keys.

    Raises:
        DataError: there are no records, or only some of them have results.
        ValueError: an array in `extras` does not have one row for each record, a key of `extras` is in
            `batch.LOADED_FIELDS`, or `options.latents` is True and the records are not from a pack with latents.
    """

    def __init__(
        self, records: Sequence[Record], options: LoaderOptions, *, extras: Mapping[str, np.ndarray] | None = None
    ):
        check_results(records)
        self._extras = dict(extras or {})
        _check_extras(self._extras, len(records))
        if options.latents and pack_encoding(records) is None:
            raise ValueError("latents=True: expected records of a pack with latents")
        self._records, self._options = list(records), options
        batch_size, buckets = options.batch_size, options.buckets
        self._rows = np.arange(batch_size) if options.rows is None else np.asarray(options.rows)
        self._cache = PanelCache(options.cache_bytes)
        self._scenes = scene_ids(records)
        record_buckets = np.array([nearest_bucket(record.size, buckets) for record in records], np.int32)
        self.batches_per_epoch = batches_per_epoch(record_buckets, batch_size)
        # Several plans are cached, because workers that read ahead in a small data set are in different epochs.
        self._get_plan = lru_cache(maxsize=8)(
            lambda epoch: epoch_plan(
                self._scenes, record_buckets, batch_size=batch_size, seed=options.seed, epoch=epoch
            )
        )

    def iterate(self, start_batch: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Return an endless Grain iterator over batches start_batch, start_batch + 1, ...; close() ends its threads."""
        workers = self._options.workers
        read_options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(2, workers) if workers else 0)
        rows = grain.MapDataset.range(start_batch * len(self._rows), _ENDLESS).map(self._load_row)
        return iter(rows.batch(len(self._rows)).to_iter_dataset(read_options))

    def _load_row(self, position: int) -> dict[str, np.ndarray]:
        """Load a row of a batch. `position` counts this process's rows over all batches."""
        batch, local_row = divmod(position, len(self._rows))
        epoch, batch = divmod(batch, self.batches_per_epoch)
        plan = self._get_plan(epoch)
        row = self._rows[local_row]
        record_id = int(plan.rows[batch, row])
        record, scene = self._records[record_id], int(self._scenes[record_id])
        try:
            example = self._load_images(record, self._options.buckets[plan.buckets[batch]])
        except UNREADABLE_ERRORS as error:
            error.add_note(
                f"while loading record {record.index} (id {record.id!r}), which was readable when the run started"
            )
            raise
        if self._options.file_masks:
            example["file_mask"] = example["mask"]
        if self._options.augment_masks:
            generator = random_generator(self._options.seed, MASK_STREAM, epoch, scene)
            example["mask"] = augment_mask(example["mask"], generator)
        example |= {
            "group_id": np.int32(scene),
            "record_id": np.int32(record_id),
            "epoch": np.int32(epoch),
            "condition_weight": plan.condition_weight[batch, row],
        }
        return example | {name: values[record_id] for name, values in self._extras.items()}

    def _load_images(self, record: Record, bucket: Size) -> dict[str, np.ndarray]:
        """Load the panels and latents of a record; the mask is not augmented."""
        options = self._options
        if not options.photos:
            return {"mask": load_mask(record, bucket, self._cache)} | _read_packed_latents(record)
        panels = load_panels(record, bucket, self._cache)
        arrays = {"source": panels.source, "reference": panels.reference, "mask": panels.mask}
        if panels.result is not None:
            arrays["result"] = panels.result
        if options.preprocess_reference is not None and not options.latents:
            arrays["redux_pixels"] = self._load_redux_pixels(record, bucket, panels)
        return arrays | (_read_packed_latents(record) if options.latents else {})

    def _load_redux_pixels(self, record: Record, bucket: Size, panels: Panels) -> np.ndarray:
        def preprocess() -> np.ndarray:
            return np.array(self._options.preprocess_reference(Image.fromarray(panels.reference)), np.float32)

        return self._cache.get(("redux", record.ref, record.src, record.mask, bucket), preprocess)


def pack_encoding(records: Sequence[Record]) -> LatentEncoding | None:
    """Return how the latents of the records' pack were computed; None without a pack, or for a pack without latents."""
    source = records[0].src
    return source.pack.encoding if isinstance(source, PackedImage) else None


def _read_packed_latents(record: Record) -> dict[str, np.ndarray]:
    examples = [record.src.example()] + ([] if record.result is None else [record.result.example()])
    return {name: example[name] for example in examples for name in LATENT_KEYS if name in example}


def check_results(records: Sequence[Record]) -> None:
    """Raise DataError if there are no records, or if only some of them have results."""
    if not records:
        raise DataError("no records: expected at least one")
    missing = [record.id for record in records if record.result is None]
    if 0 < len(missing) < len(records):
        ids = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise DataError(
            f"{len(missing)} of {len(records)} records have no result ({ids}): expected a result in all or in none"
        )


def check_buckets(buckets: Sequence[Size], multiple: int) -> None:
    """Raise DataError if the height or width of a bucket is not divisible by `multiple`."""
    for bucket in buckets:
        if any(side % multiple for side in bucket):
            nearest_valid = ",".join(str(max(1, round(side / multiple)) * multiple) for side in bucket)
            raise DataError(
                f"aspect_ratio_buckets: {bucket[0]},{bucket[1]} has a side that is not a multiple of {multiple} "
                f'pixels (the size of a token of this model); the nearest valid size is "{nearest_valid}"'
            )


def _check_extras(extras: Mapping[str, np.ndarray], count: int) -> None:
    for name, values in extras.items():
        if name in LOADED_FIELDS:
            raise ValueError(f"extras[{name!r}]: batches already have this key; choose another name")
        if len(values) != count:
            raise ValueError(f"extras[{name!r}] has {len(values)} values: expected {count}, one per record")


def _check_rows(rows: Sequence[int] | None, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    if rows is not None and (len(rows) == 0 or min(rows) < 0 or max(rows) >= batch_size):
        raise ValueError(f"rows {list(rows)[:8]}: expected at least one row, each from 0 to {batch_size - 1}")
