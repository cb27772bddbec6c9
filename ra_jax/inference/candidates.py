"""The scenes that a user names and the candidates made for them: pictures, and records ready to be scored.

Beside the pictures stands `records.json`, a data set as training reads it, in which only the scores are missing.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from ra_jax.data.formats import RECORDS, Entry, RawData, match_stem, pictures_by_stem
from ra_jax.data.images import SUFFIXES, read_photo, read_soft_mask
from ra_jax.data.packs import check_not_pack
from ra_jax.data.records import Record, check_entries, load_records, scene_ids
from ra_jax.errors import DataError
from ra_jax.outputs import replace_file, write_file

# (photo, soft mask [H, W] uint8, reference or None, seed) -> the photo with the object removed
Remove = Callable[[Image.Image, np.ndarray, Image.Image | None, int], Image.Image]


@dataclass(frozen=True)
class Candidate:
    """A picture to be made: the scene it is made from, the seed, and the file it becomes."""

    scene: Record
    seed: int
    path: Path


def find_scenes(
    source_image: str | Path, source_mask: str | Path | None = None, ref_image: str | Path | None = None
) -> list[Record]:
    """The scenes to remove objects from, one record each, everything checked.

    source_image: a photo; a folder of photos; or, without source_mask, a data set in any of its forms, of which each
    scene (photo and mask) counts once, whatever its results. source_mask, ref_image: a picture, or for a folder of
    photos a folder in which each has a mask (and may have a reference) of its name, with another ending if need be.

    Raises:
        DataError: with every scene that cannot be used.
    """
    source = Path(source_image)
    if source_mask is None:
        return _data_set_scenes(source, ref_image)
    records, errors = check_entries(_loose_entries(source, Path(source_mask), ref_image), need_result=False)
    if errors:
        raise DataError.from_errors(source, errors)
    return records


def plan_candidates(scenes: Sequence[Record], seeds: Sequence[int], output_dir: str | Path) -> list[Candidate]:
    """A candidate for every scene and seed, to become `<photo's name>_<seed>.png`."""
    folder = Path(output_dir)
    named = zip(scenes, scene_names(scenes), strict=True)
    return [Candidate(scene, seed, folder / f"{name}_{seed}.png") for scene, name in named for seed in seeds]


def check_overwrite(candidates: Sequence[Candidate], *, overwrite: bool) -> None:
    """Check that candidates replace earlier results only, and those only if `overwrite` is given.

    An earlier result is one that `records.json` names, whether its picture is there or not: the record may hold scores.

    Raises:
        DataError: a picture is there that `records.json` does not name, or a record of a candidate's id names another
            picture; an earlier result is there, without `overwrite`. Also where `records.json` is not a list of records
            with ids that differ.
    """
    folder = candidates[0].path.parent
    earlier = _earlier_records(folder / RECORDS)
    there = [candidate.path for candidate in candidates if candidate.path.stem in earlier]
    for path in (candidate.path for candidate in candidates):
        if path.stem not in earlier and os.path.lexists(path):
            raise DataError(
                f"{path}: already exists, and {folder / RECORDS} does not name it as a result; choose another "
                "--output_dir or --seed, or move it"
            )
        if path.stem in earlier and not _names_result(earlier[path.stem], path):
            raise DataError(
                f"{folder / RECORDS}: its record {path.stem!r} has another result than {path.name}; choose another "
                "--output_dir or --seed"
            )
    if there and not overwrite:
        raise DataError(
            f"{there[0]}: {len(there)} of the pictures to be made are there already, or have records that may have "
            "been scored; choose another --output_dir or --seed, or add --overwrite"
        )


def write_candidates(candidates: Sequence[Candidate], remove: Remove) -> Iterator[Path]:
    """Make the candidates: each one's picture, and its record in `records.json` beside it.

    Yields each picture's path once it and its record are written, so that a run that is stopped leaves a complete data
    set of what it made. Records of other pictures that `records.json` holds already are kept.
    """
    for _, group in groupby(candidates, key=lambda candidate: candidate.scene.index):
        inputs = None
        for candidate in group:
            inputs = inputs or _read_inputs(candidate.scene)
            folder = candidate.path.parent
            folder.mkdir(parents=True, exist_ok=True)
            result = remove(*inputs, candidate.seed)
            with replace_file(candidate.path) as draft:
                result.save(draft, "PNG")
            records = _earlier_records(folder / RECORDS) | {candidate.path.stem: _record(candidate)}
            write_file(folder / RECORDS, json.dumps(list(records.values()), indent=1, ensure_ascii=False) + "\n")
            yield candidate.path


def scene_names(scenes: Sequence[Record]) -> list[str]:
    """The photos' names, made to differ: `street`, `street-2` for another photo or mask of that name, ..."""
    names: dict[str, None] = {}
    for scene in scenes:
        name, count = scene.src.stem, 1
        while name in names:
            count += 1
            name = f"{scene.src.stem}-{count}"
        names[name] = None
    return list(names)


def _data_set_scenes(source: Path, ref_image: str | Path | None) -> list[Record]:
    check_not_pack(source, "removal writes the paths of")
    if source.suffix.lower() in SUFFIXES or (source.is_dir() and not (source / "input").is_dir()):
        raise DataError(f"{source}: no --source_mask; expected the mask of this photo, or the folder of these photos'")
    if ref_image is not None:
        raise DataError(f"{ref_image}: --ref_image with a data set, whose records name references; leave it out")
    records = load_records(source, need_result=False)
    _, first = np.unique(scene_ids(records), return_index=True)
    return [records[i] for i in first]


def _loose_entries(source: Path, mask: Path, ref_image: str | Path | None) -> RawData:
    """Entries of a photo, or of every photo in a folder, as a data file would hold them."""
    reference = None if ref_image is None else Path(ref_image)
    if not source.is_dir():
        return _entries([_fields(source, mask, reference)])
    if not mask.is_dir() or (reference is not None and not reference.is_dir()):
        raise DataError(
            f"{source} is a folder: expected folders for --source_mask and --ref_image, with files named alike"
        )
    photos = sorted(path for paths in pictures_by_stem(source).values() for path in paths)
    masks, references = pictures_by_stem(mask), {} if reference is None else pictures_by_stem(reference)
    if not photos:
        raise DataError(f"{source}: no pictures; expected files ending in {', '.join(sorted(SUFFIXES))}")
    if missing := [photo.name for photo in photos if match_stem(photo.name, masks) is None]:
        named = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise DataError(
            f"{mask}: no mask for {len(missing)} of {len(photos)} photos in {source} ({named}); "
            "expected files named as the photos are"
        )
    return _entries(
        [_fields(photo, match_stem(photo.name, masks), match_stem(photo.name, references)) for photo in photos]
    )


def _entries(records: Sequence[dict[str, str]]) -> RawData:
    return RawData(Path(), [Entry(number, fields) for number, fields in enumerate(records)], [])


def _fields(src: Path, mask: Path, ref: Path | None) -> dict[str, str]:
    fields = {"src": str(src), "mask": str(mask)}
    return fields if ref is None else fields | {"ref": str(ref)}


def _read_inputs(scene: Record) -> tuple[Image.Image, np.ndarray, Image.Image | None]:
    reference = None if scene.ref is None else read_photo(scene.ref)
    return read_photo(scene.src), read_soft_mask(scene.mask), reference


def _record(candidate: Candidate) -> dict[str, str]:
    """The record of a candidate, with paths relative to the folder that its data file lies in."""
    scene, folder = candidate.scene, candidate.path.parent.resolve()
    fields = {"id": candidate.path.stem}
    for name, file in (("ref", scene.ref), ("src", scene.src), ("mask", scene.mask), ("result", candidate.path)):
        if file is not None:
            fields[name] = Path(os.path.relpath(file.resolve(), folder)).as_posix()
    return fields | {"source": "policy"}


def _earlier_records(path: Path) -> dict[str, dict]:
    """The records of an earlier run into the same folder, by id.

    Raises:
        DataError: the file is not a list of records with ids that differ, of which none would be lost.
    """
    if not os.path.lexists(path):
        return {}
    advice = "move it, or choose another --output_dir"
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a list of records with ids ({error}); {advice}") from None
    if not isinstance(records, list) or not all(
        isinstance(record, dict) and isinstance(record.get("id"), str) for record in records
    ):
        raise DataError(f"{path}: not a list of records with ids; {advice}")
    by_id = {record["id"]: record for record in records}
    if len(by_id) < len(records):
        twice = next(name for name, count in Counter(record["id"] for record in records).items() if count > 1)
        raise DataError(f"{path}: several records have the id {twice!r}, expected ids that differ; {advice}")
    return by_id


def _names_result(record: dict, path: Path) -> bool:
    """Whether a record of the data file beside `path` has that picture as its result."""
    result = record.get("result")
    return isinstance(result, str) and os.path.abspath(path.parent / result) == os.path.abspath(path)
