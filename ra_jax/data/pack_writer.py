"""Write packs in the format that `packs` describes, with the original image files or with panels and their latents."""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ra_jax.data.images import ImageFile, Size
from ra_jax.data.inputs import record_paths
from ra_jax.data.loader import check_results
from ra_jax.data.packs import LABEL_FIELDS, SPLIT, VERSION, Example, LatentEncoding, import_tfds
from ra_jax.data.panels import Panels, load_panels, nearest_bucket
from ra_jax.data.records import Record
from ra_jax.data.split import photo_ids
from ra_jax.errors import DataError, OutputError
from ra_jax.outputs import Inputs, Outputs, check_outputs, check_staging, replace_folder, staging_folder

SHARD_BYTES = 256 * 2**20
EXAMPLES_PER_WRITE = 16  # examples per call of the writer; each call updates the metadata of the set


class Encoder(Protocol):
    """Computes latents and image tokens of panels.

    Attributes:
        encoding: models and settings of the encoder, which the pack stores.
        buckets: sizes of the panels.
    """

    encoding: LatentEncoding
    buckets: Sequence[Size]

    def condition(self, panels: Panels) -> Mapping[str, np.ndarray]:
        """Return the arrays to store for a photo with its mask and reference."""

    def result(self, panels: Panels) -> Mapping[str, np.ndarray]:
        """Return the arrays to store for a result."""


def check_pack_folder(folder: Path, inputs: Inputs, nested: Inputs | None = None) -> None:
    """Check that a pack can be written to `folder` without overwriting an input.

    Args:
        folder: folder of the pack.
        inputs: paths that the command reads, as for `check_outputs`.
        nested: more paths that the command reads, as for `check_outputs`.

    Raises:
        DataError: tensorflow-datasets does not accept the name of the folder, or tensorflow-datasets is not installed.
        OutputError: one of the following holds.

            * `folder` already exists.
            * `folder` or FOLDER.partial overlaps an input: they are equal, or one contains the other.
            * FOLDER.partial exists and was not left by a stopped run.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", folder.name):
        raise DataError(
            f"{folder}: {folder.name!r} is not a valid name for a pack; expected lower-case letters, digits and _, "
            "starting with a letter"
        )
    check_outputs(Outputs("FOLDER", folder, owned=[folder, staging_folder(folder)]), inputs, nested)
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder} already exists: choose another folder")
    check_staging(folder)
    import_tfds()


def write_pack(
    records: Sequence[Record],
    folder: Path,
    *,
    encoder: Encoder | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Write records and their images to a pack. With an encoder, the pack also gets latents and image tokens.

    Only a few examples are in memory at a time. The pack is written to FOLDER.partial. When it is complete, this folder
    is renamed.

    Args:
        records: records to write.
        folder: folder of the pack; it must not exist.
        encoder: computes latents and image tokens; None stores the original image files.
        progress: wraps the iteration over conditions and the iteration over records, for example in a progress bar.

    Raises:
        DataError: raised by `check_pack_folder`. With an encoder, it is also raised if only some records have results.
        OutputError: raised by `check_pack_folder`.
    """
    check_pack_folder(folder, {"the data set": record_paths(records)})
    if encoder is not None:
        check_results(records)
    first_records: dict[tuple, Record] = {}  # the first record of each condition
    scenes: dict[tuple, int] = {}
    for record in records:
        first_records.setdefault(_condition_key(record), record)
    condition_index = {key: index for index, key in enumerate(first_records)}
    conditions = list(first_records.values())
    photos = photo_ids(conditions)
    metadata = {
        "encoding": None if encoder is None else asdict(encoder.encoding),
        "conditions": [
            {
                "size": _panel_size(encoder, record) or record.size,
                "scene": scenes.setdefault((record.src, record.mask), index),
                "photo": photos[index],
                "ref": record.ref is not None,
            }
            for index, record in enumerate(conditions)
        ],
        "records": [
            {name: getattr(record, name) for name in LABEL_FIELDS}
            | {"condition": condition_index[_condition_key(record)], "result": record.result is not None}
            for record in records
        ],
    }
    with replace_folder(folder) as staging:
        examples = (_condition_example(record, encoder) for record in progress(conditions))
        _write_set(staging, folder.name, "conditions", examples, {})
        examples = (
            _record_example(record, condition_index[_condition_key(record)], encoder) for record in progress(records)
        )
        _write_set(staging, folder.name, "records", examples, metadata)


def _condition_key(record: Record) -> tuple[ImageFile, ImageFile, ImageFile | None]:
    return record.src, record.mask, record.ref


def _panel_size(encoder: Encoder | None, record: Record) -> Size | None:
    """Return the panel size that the encoder uses for a record; None without an encoder."""
    return None if encoder is None else encoder.buckets[nearest_bucket(record.size, encoder.buckets)]


def _condition_example(record: Record, encoder: Encoder | None) -> Example:
    if encoder is None:
        ref = _MISSING_IMAGE if record.ref is None else record.ref.read_bytes()
        return {"src": record.src.read_bytes(), "mask": record.mask.read_bytes(), "ref": ref}
    panels = load_panels(record, _panel_size(encoder, record))
    ref = _MISSING_IMAGE if record.ref is None else _png(panels.reference)
    images = {"src": _png(panels.source), "mask": _png(panels.mask * np.uint8(255)), "ref": ref}
    return images | dict(encoder.condition(panels))


def _record_example(record: Record, condition: int, encoder: Encoder | None) -> Example:
    example: Example = {"condition": condition, "result": _MISSING_IMAGE}
    if record.result is None:
        return example
    if encoder is None:
        return example | {"result": record.result.read_bytes()}
    panels = load_panels(record, _panel_size(encoder, record))
    return example | {"result": _png(panels.result)} | dict(encoder.result(panels))


def _png(panel: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(panel).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


_MISSING_IMAGE = _png(np.zeros((1, 1, 3), np.uint8))  # one pixel in place of a missing image; readers can decode it


def _write_set(folder: Path, name: str, part: str, examples: Iterator[Example], metadata: dict) -> None:
    """Write one tensorflow-datasets set. The first example determines the names and types of the set's features."""
    tfds, set_folder = import_tfds(), folder / part / VERSION
    set_folder.mkdir(parents=True)
    batch = list(islice(examples, EXAMPLES_PER_WRITE))
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=VERSION, data_dir=str(set_folder), module_name=__name__, config_name=part
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=__doc__,
        features=tfds.features.FeaturesDict({key: _feature(tfds, value) for key, value in batch[0].items()}),
        metadata=tfds.core.MetadataDict(metadata),
    )
    example_bytes = max(map(_count_bytes, batch))  # the largest, because records without results are small
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=max(1, SHARD_BYTES // example_bytes), file_format="array_record"
    )
    writer.initialize_splits([SPLIT])
    while batch:
        writer.add_examples({SPLIT: batch})
        batch = list(islice(examples, EXAMPLES_PER_WRITE))
    writer.close_all()


def _count_bytes(example: Example) -> int:
    return sum(len(value) if isinstance(value, bytes) else np.asarray(value).nbytes for value in example.values())


def _feature(tfds, value: Any):
    if isinstance(value, bytes):
        return tfds.features.Image()
    if isinstance(value, np.ndarray):
        return tfds.features.Tensor(shape=(None, value.shape[1]), dtype=value.dtype, encoding="bytes")
    return np.int64
