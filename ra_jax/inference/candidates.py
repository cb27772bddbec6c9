"""Find the scenes to edit, and write candidates for them: one image and one record per candidate.

The records are written to `records.json` in the folder of the images. This file is a data set. After scores have been
added to its records, training can read it.
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

from ra_jax.data.formats import RECORDS_FILE, Entry, RawData, images_by_stem, match_stem
from ra_jax.data.images import SUFFIXES, read_photo, read_soft_mask
from ra_jax.data.packs import check_not_pack
from ra_jax.data.records import Record, check_entries, load_records, scene_ids
from ra_jax.errors import DataError
from ra_jax.outputs import replace_file, write_file

# (photo, soft mask [H, W] uint8, reference or None, seed) -> the photo with the object removed
RemovalFunction = Callable[[Image.Image, np.ndarray, Image.Image | None, int], Image.Image]


@dataclass(frozen=True)
class Candidate:
    """A removal that is to be written.

    Attributes:
        scene: record with the photo, mask and reference.
        seed: seed of the sampler's noise.
        path: image file to write.
    """

    scene: Record
    seed: int
    path: Path


def find_scenes(
    source_image: str | Path, source_mask: str | Path | None = None, ref_image: str | Path | None = None
) -> list[Record]:
    """Find the scenes to remove objects from, and check their files; returns one record per scene.

    Args:
        source_image: a photo, a folder of photos, or a data set in any format. It must be a data set if `source_mask`
            is None. Each scene of a data set (photo and mask) is returned once, even if it has several results.
        source_mask: mask of the photo. For a folder of photos, a folder with one mask per photo. A mask has the photo's
            file name, but may have another suffix.
        ref_image: reference of the photo. For a folder of photos, a folder of references with the photos' file names.
            Photos without a reference are allowed.

    Raises:
        DataError: a scene cannot be used. The message says why.
    """
    source = Path(source_image)
    if source_mask is None:
        return _data_set_scenes(source, ref_image)
    records, errors = check_entries(_photo_entries(source, Path(source_mask), ref_image), need_result=False)
    if errors:
        raise DataError.from_errors(source, errors)
    return records


def plan_candidates(scenes: Sequence[Record], seeds: Sequence[int], output_dir: str | Path) -> list[Candidate]:
    """Return a candidate for every scene and seed, with the path `output_dir`/<scene name>_<seed>.png.

    `scene_names` determines the scene names.
    """
    folder = Path(output_dir)
    named_scenes = zip(scenes, scene_names(scenes), strict=True)
    return [Candidate(scene, seed, folder / f"{name}_{seed}.png") for scene, name in named_scenes for seed in seeds]


def check_overwrite(candidates: Sequence[Candidate], *, overwrite: bool) -> None:
    """Check that candidates replace no other files than earlier results, and earlier results only with `overwrite`.

    A candidate replaces an earlier result if `records.json` has a record with the candidate's id. The image of this
    record need not exist, because its scores would be lost in any case.

    Raises:
        DataError: one of the following holds.

            * A candidate's file exists, but `records.json` has no record with the candidate's id.
            * `records.json` has a record with the candidate's id, but its result is another image.
            * A candidate replaces an earlier result, and `overwrite` is False.
            * `records.json` is not a list of records with unique ids.
    """
    folder = candidates[0].path.parent
    records = _read_records(folder / RECORDS_FILE)
    earlier_results = [candidate.path for candidate in candidates if candidate.path.stem in records]
    for path in (candidate.path for candidate in candidates):
        if path.stem not in records and os.path.lexists(path):
            raise DataError(
                f"{path}: already exists, but {folder / RECORDS_FILE} does not name it as a result; choose another "
                "--output_dir or --seed, or move the file"
            )
        if path.stem in records and not _names_result(records[path.stem], path):
            raise DataError(
                f"{folder / RECORDS_FILE}: the result of record {path.stem!r} is not {path.name}; choose another "
                "--output_dir or --seed"
            )
    if earlier_results and not overwrite:
        raise DataError(
            f"{earlier_results[0]}: {len(earlier_results)} of the images to be written already exist, or have records "
            "that may have scores; choose another --output_dir or --seed, or add --overwrite"
        )


def write_candidates(candidates: Sequence[Candidate], remove: RemovalFunction) -> Iterator[Path]:
    """Compute each candidate, write its image, and write its record to `records.json` in the same folder.

    Yields the path of each image after image and record have been written. A run that is stopped therefore leaves a
    valid data set with all candidates written so far. Other records in `records.json` are kept.
    """
    for _, scene_candidates in groupby(candidates, key=lambda candidate: candidate.scene.index):
        inputs = None
        for candidate in scene_candidates:
            inputs = inputs or _read_inputs(candidate.scene)
            folder = candidate.path.parent
            folder.mkdir(parents=True, exist_ok=True)
            result = remove(*inputs, candidate.seed)
            with replace_file(candidate.path) as draft:
                result.save(draft, "PNG")
            records = _read_records(folder / RECORDS_FILE) | {candidate.path.stem: _candidate_record(candidate)}
            write_file(folder / RECORDS_FILE, json.dumps(list(records.values()), indent=1, ensure_ascii=False) + "\n")
            yield candidate.path


def scene_names(scenes: Sequence[Record]) -> list[str]:
    """Return a unique name for each scene: the photo's file name without suffix.

    If an earlier scene has this name, `-2`, `-3`, ... is appended: `street`, `street-2`.
    """
    names: dict[str, None] = {}
    for scene in scenes:
        name, count = scene.src.stem, 1
        while name in names:
            count += 1
            name = f"{scene.src.stem}-{count}"
        names[name] = None
    return list(names)


def _data_set_scenes(source: Path, ref_image: str | Path | None) -> list[Record]:
    check_not_pack(source, f"{RECORDS_FILE} needs the paths of image files")
    if source.suffix.lower() in SUFFIXES or (source.is_dir() and not (source / "input").is_dir()):
        raise DataError(
            f"{source}: --source_mask is missing; expected the mask of this photo, or a folder with the masks of these "
            "photos"
        )
    if ref_image is not None:
        raise DataError(
            f"{ref_image}: --ref_image cannot be used with a data set, because its records name the references; remove "
            "--ref_image"
        )
    records = load_records(source, need_result=False)
    _, first_records = np.unique(scene_ids(records), return_index=True)
    return [records[i] for i in first_records]


def _photo_entries(source: Path, mask: Path, ref_image: str | Path | None) -> RawData:
    """Return entries like those of a data set for a single photo, or for every photo in a folder."""
    reference = None if ref_image is None else Path(ref_image)
    if not source.is_dir():
        return _raw_data([_entry_fields(source, mask, reference)])
    if not mask.is_dir() or (reference is not None and not reference.is_dir()):
        raise DataError(
            f"{source} is a folder: expected folders for --source_mask and --ref_image, too, with the photos' file "
            "names"
        )
    photos = sorted(path for paths in images_by_stem(source).values() for path in paths)
    masks, references = images_by_stem(mask), {} if reference is None else images_by_stem(reference)
    if not photos:
        raise DataError(f"{source}: no images; expected files with one of the suffixes {', '.join(sorted(SUFFIXES))}")
    if missing := [photo.name for photo in photos if match_stem(photo.name, masks) is None]:
        examples = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise DataError(
            f"{mask}: no mask for {len(missing)} of {len(photos)} photos in {source} ({examples}); "
            "expected masks with the photos' file names"
        )
    return _raw_data(
        [_entry_fields(photo, match_stem(photo.name, masks), match_stem(photo.name, references)) for photo in photos]
    )


def _raw_data(records: Sequence[dict[str, str]]) -> RawData:
    return RawData(Path(), [Entry(number, fields) for number, fields in enumerate(records)], [])


def _entry_fields(src: Path, mask: Path, ref: Path | None) -> dict[str, str]:
    fields = {"src": str(src), "mask": str(mask)}
    return fields if ref is None else fields | {"ref": str(ref)}


def _read_inputs(scene: Record) -> tuple[Image.Image, np.ndarray, Image.Image | None]:
    reference = None if scene.ref is None else read_photo(scene.ref)
    return read_photo(scene.src), read_soft_mask(scene.mask), reference


def _candidate_record(candidate: Candidate) -> dict[str, str]:
    """Return the record of a candidate, with paths relative to the folder of `records.json`."""
    scene, folder = candidate.scene, candidate.path.parent.resolve()
    fields = {"id": candidate.path.stem}
    for name, file in (("ref", scene.ref), ("src", scene.src), ("mask", scene.mask), ("result", candidate.path)):
        if file is not None:
            fields[name] = Path(os.path.relpath(file.resolve(), folder)).as_posix()
    return fields | {"source": "policy"}


def _read_records(path: Path) -> dict[str, dict]:
    """Return the records in the file `path` by id, or an empty dict if the file does not exist.

    Raises:
        DataError: the file is not a list of records with unique ids. Rewriting such a file could lose records.
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
    records_by_id = {record["id"]: record for record in records}
    if len(records_by_id) < len(records):
        duplicate = next(name for name, count in Counter(record["id"] for record in records).items() if count > 1)
        raise DataError(f"{path}: several records have the id {duplicate!r}, expected unique ids; {advice}")
    return records_by_id


def _names_result(record: dict, path: Path) -> bool:
    """Return whether `path` is the result of a record whose paths are relative to the folder of `path`."""
    result = record.get("result")
    return isinstance(result, str) and os.path.abspath(path.parent / result) == os.path.abspath(path)
