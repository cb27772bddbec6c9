"""Write packs, in the format that `packs` describes: the original image files, or panels with their latents."""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ra_jax.data.images import Picture, Size
from ra_jax.data.inputs import record_paths
from ra_jax.data.loader import check_results
from ra_jax.data.packs import LABELS, SPLIT, VERSION, Encoding, Example, import_tfds
from ra_jax.data.panels import Panels, load_panels, nearest_bucket
from ra_jax.data.records import Record
from ra_jax.errors import DataError, OutputError
from ra_jax.outputs import Inputs, Outputs, check_outputs, check_staging, replace_folder, staging_folder

SHARD_BYTES = 256 * 2**20
ENCODE_BATCH = 16  # examples per call of the writer, which updates the metadata of the set each time


class Encoder(Protocol):
    """Computes the arrays of examples from panels of one bucket."""

    encoding: Encoding
    buckets: Sequence[Size]

    def condition(self, panels: Panels) -> Mapping[str, np.ndarray]:
        """Return the arrays for a photo, its mask and its reference."""

    def result(self, panels: Panels) -> Mapping[str, np.ndarray]:
        """Return the arrays for a result."""


def check_target(folder: Path, inputs: Inputs, nested: Inputs | None = None) -> None:
    """Check that a pack can be written to `folder` without overwriting an input.

    Args:
        folder: folder of the pack.
        inputs: paths that are read, as for `check_outputs`.
        nested: folders that are read and may lie in `folder`, as for `check_outputs`.

    Raises:
        DataError: tensorflow-datasets does not accept the name of the folder, or it is not installed.
        OutputError: `folder` already exists; `folder` or FOLDER.partial is, contains or lies in an input; or
            FOLDER.partial exists and was not left by a stopped run.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", folder.name):
        raise DataError(f"{folder}: {folder.name!r} is no name for a pack; expected small letters, digits and _")
    check_outputs(Outputs("FOLDER", folder, owned=[folder, staging_folder(folder)]), inputs, nested)
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder} is there already: choose another folder")
    check_staging(folder)
    import_tfds()


def write_pack(
    records: Sequence[Record],
    folder: Path,
    *,
    encoder: Encoder | None = None,
    watch: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Write the records and their images to a pack, with an encoder also their latents.

    Only a few examples are in memory at a time. The pack is written to FOLDER.partial, which is renamed when it is
    complete.

    Args:
        records: records to write.
        folder: folder of the pack; it must not exist.
        encoder: computes latents and image tokens; None stores the original image files.
        watch: wraps the iteration over conditions and over records, for example in a progress bar.

    Raises:
        DataError: raised by `check_target`; or there is an encoder and only some records have results.
        OutputError: raised by `check_target`.
    """
    check_target(folder, {"the data set": record_paths(records)})
    if encoder is not None:
        check_results(records)
    first: dict[tuple, int] = {}  # index of the first record of each condition
    scenes: dict[tuple, int] = {}
    for number, record in enumerate(records):
        first.setdefault(_condition_of(record), number)
    numbers = {condition: number for number, condition in enumerate(first)}
    conditions = [records[number] for number in first.values()]
    about = {
        "encoding": None if encoder is None else asdict(encoder.encoding),
        "conditions": [
            {
                "size": _bucket(encoder, record) or record.size,
                "scene": scenes.setdefault((record.src, record.mask), number),
                "ref": record.ref is not None,
            }
            for number, record in enumerate(conditions)
        ],
        "records": [
            {name: getattr(record, name) for name in LABELS}
            | {"condition": numbers[_condition_of(record)], "result": record.result is not None}
            for record in records
        ],
    }
    with replace_folder(folder) as staging:
        pictures = (_condition(record, encoder) for record in watch(conditions))
        _write_set(staging, folder.name, "conditions", pictures, {})
        examples = (_record(record, numbers[_condition_of(record)], encoder) for record in watch(records))
        _write_set(staging, folder.name, "records", examples, about)


def _condition_of(record: Record) -> tuple[Picture, Picture, Picture | None]:
    return record.src, record.mask, record.ref


def _bucket(encoder: Encoder | None, record: Record) -> Size | None:
    """Return the panel size that the encoder uses for a record; None without an encoder."""
    return None if encoder is None else encoder.buckets[nearest_bucket(record.size, encoder.buckets)]


def _condition(record: Record, encoder: Encoder | None) -> Example:
    if encoder is None:
        ref = NOTHING if record.ref is None else record.ref.read_bytes()
        return {"src": record.src.read_bytes(), "mask": record.mask.read_bytes(), "ref": ref}
    panels = load_panels(record, _bucket(encoder, record))
    ref = NOTHING if record.ref is None else _png(panels.reference)
    pictures = {"src": _png(panels.source), "mask": _png(panels.mask * np.uint8(255)), "ref": ref}
    return pictures | dict(encoder.condition(panels))


def _record(record: Record, condition: int, encoder: Encoder | None) -> Example:
    example: Example = {"condition": condition, "result": NOTHING}
    if record.result is None:
        return example
    if encoder is None:
        return example | {"result": record.result.read_bytes()}
    panels = load_panels(record, _bucket(encoder, record))
    return example | {"result": _png(panels.result)} | dict(encoder.result(panels))


def _png(panel: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(panel).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


NOTHING = _png(np.zeros((1, 1, 3), np.uint8))  # placeholder for a missing image that every reader can decode


def _write_set(folder: Path, name: str, part: str, examples: Iterator[Example], about: dict) -> None:
    """Write one tensorflow-datasets set; the first example defines its features."""
    tfds, place = import_tfds(), folder / part / VERSION
    place.mkdir(parents=True)
    some = list(islice(examples, ENCODE_BATCH))
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=VERSION, data_dir=str(place), module_name=__name__, config_name=part
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=__doc__,
        features=tfds.features.FeaturesDict({name: _feature(tfds, value) for name, value in some[0].items()}),
        metadata=tfds.core.MetadataDict(about),
    )
    size = max(map(_bytes_of, some))  # the maximum, because a record without a result is small
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=max(1, SHARD_BYTES // size), file_format="array_record"
    )
    writer.initialize_splits([SPLIT])
    while some:
        writer.add_examples({SPLIT: some})
        some = list(islice(examples, ENCODE_BATCH))
    writer.close_all()


def _bytes_of(example: Example) -> int:
    return sum(len(value) if isinstance(value, bytes) else np.asarray(value).nbytes for value in example.values())


def _feature(tfds, value: Any):
    if isinstance(value, bytes):
        return tfds.features.Image()
    if isinstance(value, np.ndarray):
        return tfds.features.Tensor(shape=(None, value.shape[1]), dtype=value.dtype, encoding="bytes")
    return np.int64
