"""Read packs. A pack is a data set in a few large ArrayRecord files with random access.

A pack consists of two tensorflow-datasets sets:

    FOLDER/conditions/1.0.0   one example for each distinct (src, mask, ref), with these three images
    FOLDER/records/1.0.0      one example for each record, with its image `result` and the index `condition`

The index `condition` refers to the example in FOLDER/conditions that the result belongs to. A missing image is stored
as a single pixel. All other fields of the records are in the metadata of FOLDER/records, which is read when the pack is
opened.

A pack without latents stores the bytes of the original image files. It therefore gives the same batches as the files.

A pack with latents stores panels as PNG: the images after they have been cropped and resized to a bucket of
--aspect_ratio_buckets. It also stores the arrays that training would compute from the panels. An example of
FOLDER/conditions then also has `masked_latents` [N, 4C] and `image_tokens` [T, D], and an example of FOLDER/records has
`result_latents` [N, 4C].

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
TFDS_PREFIX = "tfds:"
LABEL_FIELDS = ("id", "scores", "split", "annotator", "source")
# Number of examples of each set that are kept in memory. The images of a record are read one after another, so without
# this cache, the same example would be read once for each image.
EXAMPLE_CACHE_SIZE = 8

Example = dict[str, Any]


@dataclass(frozen=True)
class LatentEncoding:
    """The models and settings that the latents and image tokens of a pack were computed with.

    Attributes:
        encoders: fingerprint of the weights of the VAE and Redux.
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
        condition_metadata: a dict for each condition: `size` of its images, `ref` (whether it has a reference),
            `scene`, the index of the first condition with the same src and mask, and `photo`, the `split.photo_id` of
            the file that src was made from (not in older packs).
        record_metadata: a dict for each record: the fields of `LABEL_FIELDS`, the index `condition`, and `result`
            (whether it has a result).

    Raises:
        DataError: a file is missing or truncated, or the two sets do not form a pack.
    """

    def __init__(self, folder: Path):
        tfds = import_tfds()
        sets = [tfds.builder_from_directory(folder / part / VERSION) for part in PARTS]
        self.folder, metadata = folder, sets[1].info.metadata or {}
        if not {"encoding", *PARTS} <= set(metadata):
            raise DataError(f"{folder}: contains two tensorflow-datasets sets, but is not a pack: {_EXPECTED_PACK}")
        self.encoding = None if metadata["encoding"] is None else LatentEncoding(**metadata["encoding"])
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
                for length in data.info.splits[SPLIT].shard_lengths:
                    end += length
                    examples[end - 1]  # raises if the file is truncated
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{folder}: files of the pack are missing or truncated ({error}): copy or write the pack again"
            ) from error
        self.condition: Callable[[int], Example] = lru_cache(EXAMPLE_CACHE_SIZE)(conditions.__getitem__)
        self.record: Callable[[int], Example] = lru_cache(EXAMPLE_CACHE_SIZE)(records.__getitem__)

    def fields(self, index: int) -> dict[str, Any]:
        """Return the fields of a record as a data file has them, but with a `PackedImage` instead of each path."""
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

    Two images compare equal if `pack`, `name` and `content_id` are equal. They then have the same bytes.

    Attributes:
        pack: pack that holds the image.
        name: "src", "mask", "ref" or "result".
        index: index of the example that holds the image.
        size: (height, width) in pixels of the record's src after EXIF orientation. In a pack with latents, all images
            have the size of the panel.
        content_id: index of an example with this image. For src and mask, it is the index of the first condition with
            the same src and mask. For ref and result, it is equal to `index`.
    """

    pack: Pack = field(repr=False)
    name: str
    index: int = field(compare=False)
    size: Size = field(compare=False)
    content_id: int = field(repr=False)

    @property
    def stem(self) -> str:
        """Name and index of the image, used in place of the stem of a file name."""
        return f"{self.name}{self.index:06d}"

    @property
    def photo_id(self) -> str | None:
        """`split.photo_id` of the photo of this image's condition; None in older packs."""
        return self.pack.condition_metadata[self.index].get("photo")

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
        path: folder of a pack, or "tfds:FOLDER".

    Raises:
        DataError: `path` is "tfds:FOLDER" and tensorflow-datasets finds no such data set, or `path` names a
            tensorflow-datasets set that is not a pack.
    """
    if not str(path).startswith(TFDS_PREFIX):
        folder = Path(path)
        if all((folder / part / VERSION / "dataset_info.json").is_file() for part in PARTS):
            return folder
        if (folder / "dataset_info.json").exists() or any(folder.glob("*.array_record*")):
            raise DataError(f"{path}: is a tensorflow-datasets set, but not a pack: {_EXPECTED_PACK}")
        return None
    tfds, name = import_tfds(), str(path).removeprefix(TFDS_PREFIX)
    try:
        folder = Path(tfds.builder(f"{name}/{PARTS[1]}", try_gcs=False).data_dir).parents[1]
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise DataError(
            f"{path}: tensorflow-datasets has no data set with this name ({_first_line(error)}): {_EXPECTED_PACK}"
        ) from error
    if pack_folder(folder) is None:
        raise DataError(f"{path}: {folder} is not a pack: {_EXPECTED_PACK}")
    return folder


_EXPECTED_PACK = (
    f"expected a folder that `python -m ra_jax.data pack FILE FOLDER` wrote, or {TFDS_PREFIX}FOLDER if it is in "
    "~/tensorflow_datasets"
)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def check_not_pack(path: str | Path, reason: str) -> None:
    """Raise DataError if `path` names a pack. The message gives `reason`, which says why a pack cannot be used."""
    if pack_folder(path) is not None:
        raise DataError(f"{path}: is a pack, but {reason}; give the data set that the pack was written from")


def _skip_image_decoding(tfds, features: Mapping) -> dict:
    return {name: tfds.decode.SkipDecoding() for name in features if isinstance(features[name], tfds.features.Image)}


def import_tfds():
    """Import tensorflow-datasets, an optional dependency for packs only; raises DataError if it is not installed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f'packs need tensorflow-datasets ({error}): run pip install "ra_jax[packs]"') from error
    return tfds
