"""List the files and folders that a command reads for an image, a folder of images, a data set or a pack.

`outputs.check_outputs` compares them with the paths that the command writes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ra_jax.data.formats import read_entries
from ra_jax.data.images import SUFFIXES, ImageFile
from ra_jax.data.packs import PackedImage, pack_folder
from ra_jax.data.records import IMAGE_FIELDS, Record

_LAYOUT_FOLDERS = ("input", "mask", "gt", "ref")  # folders in which the images of a data set are found by name


def flag_inputs(flags: Mapping[str, str | Path | None]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """List the paths that are read for flags that name images or data sets.

    Args:
        flags: flag -> its value; flags with the value None are skipped.

    Returns:
        The arguments `inputs` and `nested` of `outputs.check_outputs`, both by flag. `inputs` holds the paths that
        `input_paths` returns. `nested` holds the folders input/, mask/, gt/ and ref/ beside the data file if images in
        them are read. No result may be written into these folders, but results may be written into their parent folder.

    Raises:
        DataError: raised by `input_paths`.
    """
    inputs = {flag: input_paths(path) for flag, path in flags.items() if path is not None}
    nested = {}
    for flag, paths in inputs.items():
        image_folders = {Path(flags[flag]).parent / name for name in _LAYOUT_FOLDERS}
        nested[flag] = sorted(image_folders & {path.parent for path in paths})
    return inputs, nested


def input_paths(path: str | Path) -> list[Path]:
    """List the files that are read for `path`, and the folders that are read completely.

    Records with errors are skipped. The list is empty if `path` does not exist.

    Args:
        path: an image, a folder of images, a data set in any format of `formats`, or a pack.

    Raises:
        DataError: `formats.read_entries` cannot read the data file.
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
    records = [entry.fields for entry in data.entries if isinstance(entry.fields, dict)]
    values = [record.get(name) for record in records for name in IMAGE_FIELDS]
    return [path, *(data.folder / value for value in values if isinstance(value, str))]


def image_paths(path: Path) -> list[Path]:
    """Return `path` and, if it is a folder, the files in it, but not the files in its subfolders.

    The list contains the files because they may be links to files outside the folder.
    """
    return [path, *(file for file in path.iterdir() if file.is_file())] if path.is_dir() else [path]


def record_paths(records: Iterable[Record]) -> list[Path]:
    """Return the image files of records without duplicates. Images in a pack are represented by the pack's folder."""
    images: Iterable[ImageFile | None] = (getattr(record, name) for record in records for name in IMAGE_FIELDS)
    paths = (image.pack.folder if isinstance(image, PackedImage) else image for image in images)
    return [path for path in dict.fromkeys(paths) if path is not None]
