"""Read packs: a data set in a few large ArrayRecord files with random access.

A pack consists of two tensorflow-datasets sets:

    FOLDER/conditions/1.0.0   one example for each distinct (src, mask, ref)
    FOLDER/records/1.0.0      one example for each record: `condition`, the index of its condition, and its `result`

Images are stored as the bytes of the original files, so that a pack gives the same batches as the files. A missing
image is stored as a single pixel. All other information about the records is in the metadata of FOLDER/records, which
is read when the pack is opened.

A pack that was written with an encoder stores images as PNG, resized to the buckets of the training. It also stores the
arrays that training would compute from them: `masked_latents` [N, 4C] and `image_tokens` [T, D] of a condition, and
`result_latents` [N, 4C] of a record.

`tfds.builder_from_directory` opens either set. Import ml_dtypes first, because image tokens may be bfloat16. A pack in
~/tensorflow_datasets can be named "tfds:FOLDER". Neither writing nor reading needs TensorFlow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy, which tensorflow-datasets needs)

from ra_jax.data.images import Size
from ra_jax.errors import DataError

VERSION = "1.0.0"
PARTS = ("conditions", "records")
SPLIT = "train"
PREFIX = "tfds:"
LABEL_FIELDS = ("id", "scores", "split", "annotator", "source")
EXAMPLE_CACHE_SIZE = 8  # examples in memory: src, mask and ref of one example are read one after another

Example = dict[str, Any]


@dataclass(frozen=True)
class Encoding:
    """The models and settings that the latents of a pack were computed with.

    Attributes:
        encoders: fingerprint of the VAE and Redux weights.
        aspect_ratio_buckets: panel sizes "height,width;..." in pixels, as for --aspect_ratio_buckets.
        mixed_precision: compute dtype of the image tokens, as for --mixed_precision.
    """

    encoders: str
    aspect_ratio_buckets: str
    mixed_precision: str


class Pack:
    """An opened pack.

    `condition(i)` and `record(i)` return the examples, with images as encoded bytes.

    Attributes:
        folder: folder of the pack.
        encoding: how the latents were computed; None for a pack without latents.
        condition_metadata: for each condition its size, scene (the first condition with the same src and mask), and
            whether it has a reference.
        record_metadata: for each record its labels, the index of the condition and whether it has a result.

    Raises:
        DataError: a file is missing or truncated, or the two sets do not form a pack.
    """

    def __init__(self, folder: Path):
        tfds = import_tfds()
        sets = [tfds.builder_from_directory(folder / part / VERSION) for part in PARTS]
        self.folder, metadata = folder, sets[1].info.metadata or {}
        if not {"encoding", *PARTS} <= set(metadata):
            raise DataError(f"{folder}: contains two tensorflow-datasets sets, but is not a pack: {_EXPECTED_PACK}")
        self.encoding = None if metadata["encoding"] is None else Encoding(**metadata["encoding"])
        self.condition_metadata: list[dict] = metadata["conditions"]
        self.record_metadata: list[dict] = metadata["records"]
        try:
            conditions, records = (
                data.as_data_source(SPLIT, decoders=_skip_image_decoding(tfds, data.info.features)) for data in sets
            )
            for part, data, examples in zip(PARTS, sets, (conditions, records), strict=True):
                if len(examples) != len(metadata[part]):
                    raise RuntimeError(f"{part} has {len(examples)} examples: expected {len(metadata[part])}")
                end = 0
                for length in data.info.splits[SPLIT].shard_lengths:  # the last example of a truncated file fails
                    end += length
                    examples[end - 1]
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{folder}: files of the pack are missing or truncated ({error}): copy or write the pack again"
            ) from error
        self.condition: Callable[[int], Example] = lru_cache(EXAMPLE_CACHE_SIZE)(conditions.__getitem__)
        self.record: Callable[[int], Example] = lru_cache(EXAMPLE_CACHE_SIZE)(records.__getitem__)

    def fields(self, index: int) -> dict[str, Any]:
        """Return the fields of a record as in a data file, with a `PackedImage` instead of each path."""
        record = self.record_metadata[index]
        condition_index = record["condition"]
        condition = self.condition_metadata[condition_index]
        size, scene = tuple(condition["size"]), condition["scene"]
        fields = {name: record[name] for name in LABEL_FIELDS}
        fields["src"] = PackedImage(self, "src", condition_index, size, content_id=scene)
        fields["mask"] = PackedImage(self, "mask", condition_index, size, content_id=scene)
        if condition["ref"]:
            fields["ref"] = PackedImage(self, "ref", condition_index, size, content_id=condition_index)
        if record["result"]:
            fields["result"] = PackedImage(self, "result", index, size, content_id=index)
        return fields


@dataclass(frozen=True)
class PackedImage:
    """An image in a pack, used instead of a path.

    Two images compare equal if `pack`, `name` and `content_id` are equal. Their bytes are then the same.

    Attributes:
        pack: pack that holds the image.
        name: "src", "mask", "ref" or "result".
        index: index of the example that holds the image.
        size: (height, width) in pixels of the record's upright photo, or of its panel in a pack with latents.
        content_id: for src and mask the first condition with the same files, for ref and result the example index.
    """

    pack: Pack = field(repr=False)
    name: str
    index: int = field(compare=False)
    size: Size = field(compare=False)
    content_id: int = field(repr=False)

    @property
    def stem(self) -> str:
        """Name and example index of the image, used like the stem of a file name."""
        return f"{self.name}{self.index:06d}"

    def example(self) -> Example:
        """Return the whole example that holds the image."""
        return (self.pack.record if self.name == "result" else self.pack.condition)(self.index)

    def read_bytes(self) -> bytes:
        """Return the bytes of the encoded image."""
        return self.example()[self.name]

    def __str__(self) -> str:
        return f"{self.name} of example {self.index} in {self.pack.folder}"


def pack_folder(path: str | Path) -> Path | None:
    """Return the folder of the pack that `path` names; None if `path` is not a pack.

    Args:
        path: folder of a pack, or "tfds:NAME".

    Raises:
        DataError: there is no data set with this name, or it is a tensorflow-datasets set but not a pack.
    """
    if not str(path).startswith(PREFIX):
        folder = Path(path)
        if all((folder / part / VERSION / "dataset_info.json").is_file() for part in PARTS):
            return folder
        if (folder / "dataset_info.json").exists() or any(folder.glob("*.array_record*")):
            raise DataError(f"{path}: is a tensorflow-datasets set, but not a pack: {_EXPECTED_PACK}")
        return None
    tfds, name = import_tfds(), str(path).removeprefix(PREFIX)
    try:
        folder = Path(tfds.builder(f"{name}/{PARTS[1]}", try_gcs=False).data_dir).parents[1]
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise DataError(
            f"{path}: tensorflow-datasets has no data set with this name ({_first_line(error)}): {_EXPECTED_PACK}"
        ) from error
    if pack_folder(folder) is None:
        raise DataError(f"{path}: {folder} is not a pack: {_EXPECTED_PACK}")
    return folder


_EXPECTED_PACK = f"expected a folder that `python -m ra_jax.data pack FILE FOLDER` wrote, or {PREFIX}NAME for it"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def check_not_pack(path: str | Path, reason: str) -> None:
    """Raise DataError if `path` names a pack; `reason` says in the message why single files are needed."""
    if pack_folder(path) is not None:
        raise DataError(f"{path}: is a pack, but {reason}; give the data set that the pack was written from")


def _skip_image_decoding(tfds, features: Mapping) -> dict:
    return {name: tfds.decode.SkipDecoding() for name in features if isinstance(features[name], tfds.features.Image)}


def import_tfds():
    """Import tensorflow-datasets, an optional dependency that only packs need. Raises DataError if it is missing."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f'packs need tensorflow-datasets ({error}): run pip install "ra_jax[packs]"') from error
    return tfds
