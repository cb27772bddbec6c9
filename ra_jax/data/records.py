"""Read and check the records of a data set before any model is loaded."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ra_jax.data.formats import Entry, RawData, read_entries
from ra_jax.data.images import (
    MASK_THRESHOLD,
    UNREADABLE_ERRORS,
    ImageFile,
    Size,
    read_mask,
    verify_photo,
    width_by_height,
)
from ra_jax.data.packs import PackedImage
from ra_jax.data.scores import SCORE_NAMES, ScoreFormat, Scores, parse_scores, suggest_name
from ra_jax.errors import DataError, RecordError

__all__ = [
    "SCORE_NAMES",
    "DataError",
    "Record",
    "RecordError",
    "check_entries",
    "check_records",
    "load_records",
    "scene_ids",
]

FIELDS = ("ref", "src", "mask", "result", "scores", "id", "split", "annotator", "source")
IMAGE_FIELDS = ("src", "mask", "ref", "result")
SOURCES = ("policy", "other", "gt")
NO_SCORES = "use_human_scores=True but no 'scores' field found in data"


@dataclass(frozen=True)
class Record:
    """One result of one condition (src, mask, ref).

    Attributes:
        index: position in the data set, from 0.
        id: unique id; the default is the index and the stem of the photo's file name.
        src: photo with the object.
        mask: mask image; pixels > 127 mark the area to remove.
        ref: image of the object; None if the reference panel has to be made from src and mask.
        result: photo without the object; None if the record has none.
        scores: (removal, background, smoothness) in [0, 1], or None.
        split: name of a split, or None.
        annotator: who gave the scores, or None.
        source: who made the result: "policy", "other", "gt" or None.
        size: (height, width) in pixels of src after EXIF orientation, or of the panel in a pack with latents.
    """

    index: int
    id: str
    src: ImageFile
    mask: ImageFile
    ref: ImageFile | None
    result: ImageFile | None
    scores: Scores | None
    split: str | None
    annotator: str | None
    source: str | None
    size: Size


@dataclass(frozen=True)
class _Requirements:
    need_result: bool
    use_human_scores: bool
    score_format: ScoreFormat


@dataclass
class _Draft:
    """A record while it is checked.

    Attributes:
        entry: the entry of the data file.
        values: values of the fields of `Record`; None for fields that are missing or wrong.
        errors: errors in the record.
    """

    entry: Entry
    values: dict
    errors: list[RecordError]

    def add_error(self, field: str, message: str) -> None:
        self.errors.append(RecordError(message, self.entry.record, self.entry.line, field))


def load_records(
    path: str | Path,
    *,
    need_result: bool = True,
    use_human_scores: bool = False,
    score_format: ScoreFormat = "dict",
) -> list[Record]:
    """Read and check a data set in any format of `formats`.

    Args:
        path: file or folder of the data set, or "tfds:NAME".
        need_result: require `result` in every record.
        use_human_scores: require `scores` in every record, in `score_format`.
        score_format: "dict" or "tensor". Without `use_human_scores`, both formats are accepted.

    Raises:
        DataError: the data set has errors or cannot be read. The message shows the first 20 errors and counts the rest.
    """
    records, errors = check_records(
        path, need_result=need_result, use_human_scores=use_human_scores, score_format=score_format
    )
    if errors:
        raise DataError.from_errors(path, errors)
    return records


def check_records(
    path: str | Path,
    *,
    need_result: bool = True,
    use_human_scores: bool = False,
    score_format: ScoreFormat = "dict",
) -> tuple[list[Record], list[RecordError]]:
    """Read a data set as `load_records` does; returns the valid records and all errors.

    Raises:
        DataError: the file does not exist, or its format is not supported.
    """
    return check_entries(
        read_entries(path), need_result=need_result, use_human_scores=use_human_scores, score_format=score_format
    )


def check_entries(
    raw: RawData,
    *,
    need_result: bool = True,
    use_human_scores: bool = False,
    score_format: ScoreFormat = "dict",
) -> tuple[list[Record], list[RecordError]]:
    """Check entries as `check_records` does, also entries that were not read from a data file."""
    errors = list(raw.errors)
    if not raw.entries and not errors:
        return [], [RecordError("no records: expected at least one")]
    requirements = _Requirements(need_result, use_human_scores, score_format)
    if use_human_scores and raw.entries and not any(_has_scores(entry) for entry in raw.entries):
        # One error for the file replaces one error per record: the file is meant for training without scores, or it is
        # the wrong file.
        errors.append(
            RecordError(f"{NO_SCORES}: expected {{{', '.join(SCORE_NAMES)}}} or a list of three in each record")
        )
        requirements = _Requirements(need_result, False, score_format)
    drafts = [_check_fields(entry, raw.folder, requirements) for entry in raw.entries]
    _check_ids(drafts)
    _check_images(drafts)
    errors += [error for draft in drafts for error in draft.errors]
    errors.sort(key=lambda error: -1 if error.record is None else error.record)
    return [Record(**draft.values) for draft in drafts if not draft.errors], errors


def scene_ids(records: Sequence[Record]) -> np.ndarray:
    """Number the scenes 0, 1, ... in the order of the records; returns the scene id of each record, [R] int32."""
    ids: dict[tuple[ImageFile, ImageFile], int] = {}
    return np.array([ids.setdefault((record.src, record.mask), len(ids)) for record in records], np.int32)


def _has_scores(entry: Entry) -> bool:
    return isinstance(entry.fields, dict) and entry.fields.get("scores") is not None


def _check_fields(entry: Entry, folder: Path, requirements: _Requirements) -> _Draft:
    """Check the fields of an entry without opening any image."""
    draft = _Draft(entry, dict.fromkeys(field.name for field in fields(Record)), [])
    if not isinstance(entry.fields, dict):
        message = f"got {type(entry.fields)}: expected an object with src, mask and result"
        draft.errors.append(RecordError(message, entry.record, entry.line))
        return draft
    draft.values["index"] = entry.record
    for name in entry.fields:
        if name not in FIELDS:
            draft.add_error(name, f"unknown field: {suggest_name(name, FIELDS)}")
    _check_paths(draft, folder, requirements)
    _check_scores(draft, requirements)
    _check_labels(draft)
    return draft


def _check_paths(draft: _Draft, folder: Path, requirements: _Requirements) -> None:
    required = ("src", "mask", "result") if requirements.need_result else ("src", "mask")
    for name in IMAGE_FIELDS:
        value = draft.entry.fields.get(name)
        if value is None:
            if name in required:
                draft.add_error(name, f"missing: expected the path of an image, relative to {folder}")
        elif isinstance(value, PackedImage):
            draft.values[name] = value
        elif not isinstance(value, str) or not value:
            draft.add_error(name, f"got {value!r} ({type(value).__name__}): expected the path of an image")
        else:
            draft.values[name] = folder / value


def _check_scores(draft: _Draft, requirements: _Requirements) -> None:
    value = draft.entry.fields.get("scores")
    if value is None:
        if requirements.use_human_scores:
            draft.add_error("scores", NO_SCORES)
        return
    packed = isinstance(draft.values["src"], PackedImage)  # a pack stores scores in its own format
    check_format = requirements.use_human_scores and not packed
    scores, problems = parse_scores(value, requirements.score_format if check_format else None)
    draft.values["scores"] = scores
    for field, message in problems:
        draft.add_error(field, message)


def _check_labels(draft: _Draft) -> None:
    record_fields = draft.entry.fields
    index, src = draft.entry.record, draft.values["src"]
    record_id = record_fields.get("id")
    if record_id is None:
        record_id = f"{index:06d}_{src.stem}" if src else f"{index:06d}"
    if isinstance(record_id, bool) or not isinstance(record_id, str | int) or record_id == "":
        draft.add_error("id", f"got {record_id!r} ({type(record_id).__name__}): expected a string or an integer")
    else:
        draft.values["id"] = str(record_id)
    for name in ("split", "annotator", "source"):
        value = record_fields.get(name)
        if value is not None and not isinstance(value, str):
            draft.add_error(name, f"got {value!r} ({type(value).__name__}): expected a string")
        elif name == "source" and value is not None and value not in SOURCES:
            draft.add_error(name, f"got {value!r}: expected one of {', '.join(SOURCES)}")
        else:
            draft.values[name] = value


def _check_ids(drafts: Iterable[_Draft]) -> None:
    first_records: dict[str, int] = {}
    for draft in drafts:
        record_id = draft.values["id"]
        if record_id is None:
            continue
        first = first_records.setdefault(record_id, draft.entry.record)
        if first != draft.entry.record:
            draft.add_error("id", f"duplicate id {record_id!r}, first used by record {first}: expected unique ids")


def _check_images(drafts: Sequence[_Draft]) -> None:
    """Decode every image once, even if several records name it.

    Images in a pack are not decoded, because they were checked when the pack was written.
    """
    images = dict.fromkeys(
        (draft.values[name], name == "mask") for draft in drafts for name in IMAGE_FIELDS if draft.values[name]
    )
    with ThreadPoolExecutor(max_workers=min(32, 2 * (os.cpu_count() or 1))) as pool:
        inspections = dict(zip(images, pool.map(lambda image: _inspect_image(*image), images), strict=True))
    for draft in drafts:
        sizes = {}
        for name in IMAGE_FIELDS:
            if path := draft.values[name]:
                sizes[name], problem = inspections[path, name == "mask"]
                if problem:
                    draft.add_error(name, problem)
        _check_sizes(draft, sizes)


def _check_sizes(draft: _Draft, sizes: dict[str, Size | None]) -> None:
    expected = draft.values["size"] = sizes.get("src")
    for name in ("mask", "result"):
        size = sizes.get(name)
        if expected and size and size != expected:
            draft.add_error(
                name,
                f"size {width_by_height(size)}, but src is {width_by_height(expected)}: "
                "expected the same size (width × height)",
            )


def _inspect_image(path: ImageFile, is_mask: bool) -> tuple[Size | None, str | None]:
    """Return the size of an image (None if it cannot be read), and an error message (None if the image is valid)."""
    if isinstance(path, PackedImage):
        return path.size, None
    if not path.is_file():
        return None, f"no such file: {path}"
    try:
        if not is_mask:
            return verify_photo(path), None
        mask = read_mask(path)
    except UNREADABLE_ERRORS as error:
        return None, f"unreadable image {path}: {error}"
    problem = None if mask.any() else f"empty mask {path}: expected at least one pixel > {MASK_THRESHOLD}"
    return mask.shape, problem
