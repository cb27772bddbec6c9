"""The files and folders that are read for a picture, a folder of pictures, a data set or a pack.

`outputs.check_outputs` compares them with what a command writes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ra_jax.data.formats import read_entries
from ra_jax.data.images import SUFFIXES, Picture
from ra_jax.data.packs import PackedPicture, pack_folder
from ra_jax.data.records import IMAGE_FIELDS, Record

LAYOUT = ("input", "mask", "gt", "ref")  # folders of a data set whose pictures are found by name


def flag_inputs(flags: Mapping[str, str | Path | None]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """What is read for flags that name pictures or data sets, as `outputs.check_outputs` wants it: inputs and nested.

    Nested are the folders beside a data file in which pictures are found by name: nothing may be written into them,
    but the folder around them, which is the data file's own, may take results.

    Raises:
        DataError: as `input_paths` does.
    """
    inputs = {flag: input_paths(path) for flag, path in flags.items() if path is not None}
    beside = {flag: {Path(flags[flag]).parent / name for name in LAYOUT} for flag in inputs}
    return inputs, {flag: sorted(beside[flag] & {path.parent for path in paths}) for flag, paths in inputs.items()}


def input_paths(path: str | Path) -> list[Path]:
    """The files that reading `path` reads, and the folders of which everything is read.

    path: a picture; a folder of pictures; a data set in any form of `formats`; a pack. Nothing where it does not exist.

    Raises:
        DataError: a data file that `formats.read_entries` does not read. Faulty records are passed over.
    """
    if (pack := pack_folder(path)) is not None:
        return [pack]
    path = Path(path)
    if not path.exists():
        return []
    if path.is_dir() and not (path / "input").is_dir():
        return image_paths(path)
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return [path]
    data = read_entries(path)
    fields = [entry.fields for entry in data.entries if isinstance(entry.fields, dict)]
    files = [data.base / file for field in fields for name in IMAGE_FIELDS if isinstance(file := field.get(name), str)]
    return [path, *files]


def image_paths(path: Path) -> list[Path]:
    """A file; or a folder and the files in it, which may be links to elsewhere: the folders in it are not read."""
    return [path, *(file for file in path.iterdir() if file.is_file())] if path.is_dir() else [path]


def record_paths(records: Iterable[Record]) -> list[Path]:
    """The files of records, and the folders of packs that hold their pictures."""
    pictures: Iterable[Picture | None] = (getattr(record, name) for record in records for name in IMAGE_FIELDS)
    folders = (picture.pack.folder if isinstance(picture, PackedPicture) else picture for picture in pictures)
    return [path for path in dict.fromkeys(folders) if path is not None]
