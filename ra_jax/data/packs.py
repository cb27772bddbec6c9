"""Packs: a data set as a few large files that are read at any place: two tensorflow-datasets sets of ArrayRecords.

    FOLDER/conditions/1.0.0   an example for each (src, mask, ref), which records share
    FOLDER/records/1.0.0      an example for each record: `condition`, the number of its own, and its `result`

Pictures are the files' own bytes (a single pixel where a record has none), so that the same batches come of a pack as
of the files. With an encoder they are panels of the training's buckets instead, as PNG, beside what training would make
of them: `masked_latents` [N, 4C] and `image_tokens` [T, D] of a condition, `result_latents` [N, 4C] of a record. What
is known of the records without their pictures stands in the metadata of FOLDER/records, which is read at once.

`tfds.builder_from_directory` opens either set (`import ml_dtypes` first: image tokens may be bfloat16); FOLDER in
~/tensorflow_datasets is "tfds:FOLDER". Neither writing nor reading needs TensorFlow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (numpy, and with it tensorflow-datasets, then knows bfloat16)

from ra_jax.data.images import Size
from ra_jax.errors import DataError

VERSION = "1.0.0"
PARTS = ("conditions", "records")
SPLIT = "train"
PREFIX = "tfds:"
LABELS = ("id", "scores", "split", "annotator", "source")
EXAMPLE_CACHE_SIZE = 8  # examples: source, mask and reference are asked for one after another

Example = dict[str, Any]


@dataclass(frozen=True)
class Encoding:
    """What a pack's latents were made with. encoders: fingerprint of VAE and Redux; buckets: as training writes them;
    mixed_precision: of the image tokens."""

    encoders: str
    aspect_ratio_buckets: str
    mixed_precision: str


class Pack:
    """An opened pack. encoding: None without latents; entries: what it says of each record.

    `condition(i)` and `record(i)` are the examples, pictures as bytes.

    Raises:
        DataError: files of it are missing or cut short, or it is another data set of this form.
    """

    def __init__(self, folder: Path):
        tfds = import_tfds()
        sets = [tfds.builder_from_directory(folder / part / VERSION) for part in PARTS]
        self.folder, about = folder, sets[1].info.metadata or {}
        if not {"encoding", *PARTS} <= set(about):
            raise DataError(f"{folder}: two tensorflow-datasets sets, but no pack: {_MADE}")
        self.encoding = None if about["encoding"] is None else Encoding(**about["encoding"])
        self.conditions: list[dict] = about["conditions"]
        self.entries: list[dict] = about["records"]
        try:
            conditions, records = (
                data.as_data_source(SPLIT, decoders=_undecoded(tfds, data.info.features)) for data in sets
            )
            for part, data, examples in zip(PARTS, sets, (conditions, records), strict=True):
                if len(examples) != len(about[part]):
                    raise RuntimeError(f"{part} has {len(examples)} examples where {len(about[part])} were written")
                end = 0
                for length in data.info.splits[SPLIT].shard_lengths:  # the last of each file: whether it is whole
                    end += length
                    examples[end - 1]
        except (RuntimeError, OSError) as error:
            raise DataError(f"{folder}: its files are not whole ({error}): copy it again, or make it anew") from error
        self.condition: Callable[[int], Example] = lru_cache(EXAMPLE_CACHE_SIZE)(conditions.__getitem__)
        self.record: Callable[[int], Example] = lru_cache(EXAMPLE_CACHE_SIZE)(records.__getitem__)

    def fields(self, number: int) -> dict[str, Any]:
        """A record as a data file would write it, with `PackedPicture`s for paths."""
        entry = self.entries[number]
        at = entry["condition"]
        condition = self.conditions[at]
        size, scene = tuple(condition["size"]), condition["scene"]
        fields = {name: entry[name] for name in LABELS}
        fields["src"] = PackedPicture(self, "src", at, size, same=scene)
        fields["mask"] = PackedPicture(self, "mask", at, size, same=scene)
        if condition["ref"]:
            fields["ref"] = PackedPicture(self, "ref", at, size, same=at)
        if entry["result"]:
            fields["result"] = PackedPicture(self, "result", number, size, same=number)
        return fields


@dataclass(frozen=True)
class PackedPicture:
    """A picture in a pack, in the place of a path. size: of its record's photo, upright, in pixels; same: equal in
    pictures that came of one file."""

    pack: Pack = field(repr=False)
    name: str
    number: int = field(compare=False)
    size: Size = field(compare=False)
    same: int = field(repr=False)

    @property
    def stem(self) -> str:
        """In the place of a file's name: what the picture is, and the number of its example."""
        return f"{self.name}{self.number:06d}"

    def example(self) -> Example:
        """The whole example that it stands in."""
        return (self.pack.record if self.name == "result" else self.pack.condition)(self.number)

    def read_bytes(self) -> bytes:
        """The encoded picture."""
        return self.example()[self.name]

    def __str__(self) -> str:
        return f"{self.name} of example {self.number} in {self.pack.folder}"


def pack_folder(path: str | Path) -> Path | None:
    """The folder of the pack that `path` names, "tfds:NAME" or the folder itself; None where it names none.

    Raises:
        DataError: no data set of that name, or one that is no pack.
    """
    if not str(path).startswith(PREFIX):
        folder = Path(path)
        if all((folder / part / VERSION / "dataset_info.json").is_file() for part in PARTS):
            return folder
        if (folder / "dataset_info.json").exists() or any(folder.glob("*.array_record*")):
            raise DataError(f"{path}: a tensorflow-datasets set, but no pack: {_MADE}")
        return None
    tfds, name = import_tfds(), str(path).removeprefix(PREFIX)
    try:
        found = Path(tfds.builder(f"{name}/{PARTS[1]}", try_gcs=False).data_dir).parents[1]
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise DataError(
            f"{path}: tensorflow-datasets finds no set of that name ({_first_line(error)}): {_MADE}"
        ) from error
    if pack_folder(found) is None:
        raise DataError(f"{path}: {found} is no pack: {_MADE}")
    return found


_MADE = f"expected the FOLDER, or {PREFIX}NAME, of `python -m ra_jax.data pack FILE FOLDER`"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def check_not_pack(path: str | Path, needed: str) -> None:
    """Raises DataError where `path` names a pack: `needed` says what for its files are needed."""
    if pack_folder(path) is not None:
        raise DataError(f"{path}: a pack has no files, which {needed}: give the data set that it was made of")


def _undecoded(tfds, features: Mapping) -> dict:
    return {name: tfds.decode.SkipDecoding() for name in features if isinstance(features[name], tfds.features.Image)}


def import_tfds():
    """The library, which is imported where packs are used: it is one of the optional ones."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f'packs need tensorflow-datasets ({error}): pip install "ra_jax[packs]"') from error
    return tfds
