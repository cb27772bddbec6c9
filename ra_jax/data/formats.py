"""Read data sets in all supported formats. Each record becomes an `Entry`: its number, its line and its fields.

    JSON list       [{"src": ..., "mask": ..., "result": ..., ...}, ...]
    JSONL           one such object per line
    mapping JSON    {"mapping": {gt: [inputs]}}, or only the inner object; the images are in gt/ input/ mask/ ref/
    folder          a folder with input/ mask/ gt/ ref/
    pack            a folder written by `pack_writer`, or "tfds:NAME"

For a mapping and for a folder, src is a file in input/ and result is a file in gt/. A mapping names both files. For a
folder, the file in gt/ has the name of the file in input/. In both cases, the mask in mask/ and the reference in ref/
have the name of the file in input/. Suffixes may differ, but a file with the same suffix is preferred. ref/ may be
missing, and gt/ may be missing in a folder.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ra_jax.data.images import SUFFIXES
from ra_jax.data.packs import Pack, pack_folder
from ra_jax.errors import DataError, RecordError

RECORDS_FILE = "records.json"  # data file that `python -m ra_jax.infer` writes into its output folder
_DEMO_FOLDER = ("output", "demo")  # folder of the data set that configs/tiny.toml uses
_EXPECTED_FORMATS = "expected a JSON list, JSONL, a mapping JSON, a folder with input/ mask/ gt/ or a pack"


@dataclass(frozen=True)
class Entry:
    """One record before it is checked.

    Attributes:
        record: position of the record in the data set, from 0.
        fields: the parsed JSON value of the record; a dict if the record is valid.
        line: line number in a JSONL file, from 1.
    """

    record: int
    fields: object
    line: int | None = None


@dataclass(frozen=True)
class RawData:
    """The entries of a data set and the errors in its format.

    Attributes:
        folder: folder that relative paths in the entries start from.
        entries: all entries without a format error.
        errors: format errors, such as broken JSON or a missing mask.
    """

    folder: Path
    entries: list[Entry]
    errors: list[RecordError]


def read_entries(path: str | Path) -> RawData:
    """Read a data set in any of the formats above.

    Raises:
        DataError: the file or folder does not exist, or it has none of the supported formats.
    """
    if (folder := pack_folder(path)) is not None:
        pack = Pack(folder)
        return RawData(folder, [Entry(i, pack.fields(i)) for i in range(len(pack.record_metadata))], [])
    path = Path(path)
    if not path.exists():
        hint = "; `python -m ra_jax.demo` creates it" if path.parts[:2] == _DEMO_FOLDER else ""
        raise DataError(f"{path}: no such file or folder{hint}: {_EXPECTED_FORMATS}")
    if path.is_dir():
        return _read_folder(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}): {_EXPECTED_FORMATS}") from error
    if path.suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path, text)
    return _read_json(path, text)


def _read_json(path: Path, text: str) -> RawData:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _read_jsonl(path, text)
        hint = "; JSON has no // comments, remove them" if "//" in text.splitlines()[error.lineno - 1] else ""
        error = RecordError(f"broken JSON: {error.msg} (column {error.colno}){hint}", line=error.lineno)
        return RawData(path.parent, [], [error])
    if isinstance(content, list):
        return RawData(path.parent, [Entry(i, fields) for i, fields in enumerate(content)], [])
    if isinstance(content, dict) and "src" not in content:
        return _read_mapping(path, content.get("mapping", content))
    top_level = "a single record" if isinstance(content, dict) else str(type(content))
    message = f"the top level is {top_level}: {_EXPECTED_FORMATS}; put records into a list"
    return RawData(path.parent, [], [RecordError(message)])


def _read_jsonl(path: Path, text: str) -> RawData:
    entries, errors = [], []
    nonempty_lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    for record, (number, line) in enumerate(nonempty_lines):
        try:
            entries.append(Entry(record, json.loads(line), number))
        except json.JSONDecodeError as error:
            errors.append(RecordError(f"broken JSON: {error.msg} (column {error.colno})", record, number))
    return RawData(path.parent, entries, errors)


def _read_mapping(path: Path, mapping: object) -> RawData:
    if not isinstance(mapping, dict):
        message = f"got {type(mapping)}: expected an object {{gt: [inputs]}}"
        return RawData(path.parent, [], [RecordError(message, field="mapping")])
    pairs, errors = [], []
    for gt, inputs in mapping.items():
        if isinstance(inputs, list) and all(isinstance(name, str) for name in inputs):
            pairs += [(name, gt) for name in inputs]
        else:
            message = f"'{gt}' maps to {str(inputs)[:80]!r}: expected a list of file names in input/"
            errors.append(RecordError(message, field="mapping"))
    raw = _read_pairs(path.parent, pairs)
    return RawData(raw.folder, raw.entries, errors + raw.errors)


def _read_folder(folder: Path) -> RawData:
    missing = [name for name in ("input", "mask") if not (folder / name).is_dir()]
    if missing:
        folders = " and ".join(f"{name}/" for name in missing)
        raise DataError(f"{folder}: a folder without {folders}: {_EXPECTED_FORMATS}")
    inputs = sorted(path.name for paths in images_by_stem(folder / "input").values() for path in paths)
    truths = images_by_stem(folder / "gt")
    pairs = ((name, match_stem(name, truths)) for name in inputs)
    return _read_pairs(folder, [(name, None if truth is None else truth.name) for name, truth in pairs])


def _read_pairs(folder: Path, pairs: Iterable[tuple[str, str | None]]) -> RawData:
    """Return entries for pairs (input, gt) of file names. The name of an input determines its mask and reference."""
    masks, references = images_by_stem(folder / "mask"), images_by_stem(folder / "ref")
    entries, errors = [], []
    for record, (name, gt) in enumerate(pairs):
        mask, ref = match_stem(name, masks), match_stem(name, references)
        if mask is None:
            message = f"no mask for input/{name}: expected mask/{name}, or the same name with another suffix"
            errors.append(RecordError(message, record, field="mask"))
            continue
        fields = {
            "src": f"input/{name}",
            "mask": f"mask/{mask.name}",
            "result": None if gt is None else f"gt/{gt}",
            "ref": None if ref is None else f"ref/{ref.name}",
        }
        entries.append(Entry(record, fields))
    return RawData(folder, entries, errors)


def images_by_stem(folder: Path) -> dict[str, list[Path]]:
    """Map file names without suffix to the images in a folder, each list sorted; empty if the folder does not exist."""
    images: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in SUFFIXES:
            images.setdefault(path.stem, []).append(path)
    return images


def match_stem(name: str, images: Mapping[str, Sequence[Path]]) -> Path | None:
    """Return the image with this file name, else the first one with the same stem, else None.

    Args:
        name: name or path of a file.
        images: images by stem, from `images_by_stem`.
    """
    candidates = images.get(Path(name).stem, ())
    return next((path for path in candidates if path.name == name), next(iter(candidates), None))
