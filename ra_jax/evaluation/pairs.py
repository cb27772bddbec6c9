"""Pairs each result with its ground truth, which is found by scene or by the photo's name.

All files are checked here, before anything is computed. Every file must be readable, every result must have a ground
truth, and both must have the same size.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from ra_jax.data.formats import RECORDS_FILE, Entry, RawData, images_by_stem
from ra_jax.data.images import SUFFIXES, UNREADABLE_ERRORS, Size, read_mask, verify_photo, width_by_height
from ra_jax.data.packs import check_not_pack
from ra_jax.data.records import Record, check_entries, load_records
from ra_jax.errors import MAX_ERRORS_SHOWN, DataError

MIN_MASK_IOU = 0.5  # two masks show the same object if their intersection over union is at least this


@dataclass(frozen=True)
class Pair:
    """A result with its photo, mask and ground truth, all of the same size.

    Attributes:
        id: the id of the result's record.
        src: the photo that the result was made from.
        mask: the mask that the result was made with.
        result: the result.
        truth: the ground truth; None if there is none.
        size: (height, width) of the photo in pixels, after EXIF rotation.
    """

    id: str
    src: Path
    mask: Path
    result: Path
    truth: Path | None
    size: Size


def find_pairs(results: str | Path, truth: str | Path | None = None, only: str | None = None) -> list[Pair]:
    """Return every result to measure, with its ground truth.

    Args:
        results: one of
            - a data set in any form except a pack,
            - a folder that `python -m ra_jax.infer` wrote,
            - a plain folder of images with the names of the photos in `truth`, which must be a data set then.
            Records of source `gt` are not measured. If `truth` is None, they are the ground truth of their scenes.
        truth: one of
            - a data set in any form except a pack. Each of its scenes must have one result, or one result of source
              `gt` among several. The ground truth of a result comes from the scene with the same photo and mask files.
              If there is none, it comes from the scene whose photo has the same name and whose mask agrees.
            - a plain folder of images with the names of the photos.
            - None. If no record of `results` has source `gt` either, the pairs have no ground truth.
        only: a glob; only results whose file name matches it are returned. None for all results.

    Raises:
        DataError: files are missing or faulty, results have no ground truth, or their ground truth has another size.
            The message names all results or files concerned, at most `MAX_ERRORS_SHOWN` of them in full.
    """
    truth_path = None if truth is None else Path(truth)
    results = Path(results)
    truths = None if truth_path is None else _read_truths(truth_path)
    records = _read_results(results, truths, only)
    result_records = [record for record in records if record.source != "gt"]
    if not result_records:
        raise DataError(f"{results}: every record is of source gt; expected results to compare with the ground truth")
    selected = set(_match_names([record.result for record in result_records], only))
    result_records = [record for record in result_records if record.result in selected]
    if truths is None:
        gt_records = [record for record in records if record.source == "gt"]
        truths = _DataSetTruths(results, gt_records) if gt_records else None
    if truths is None:
        return [_make_pair(record, None) for record in result_records]
    paths = [truths.find(record) for record in result_records]
    errors = [
        f"{record.result}: {path}" for record, path in zip(result_records, paths, strict=True) if isinstance(path, str)
    ]
    if errors:
        title = f"{truths.path}: no ground truth for {len(errors)} of {len(result_records)} results"
        raise DataError(_format_errors(title, errors))
    _check_sizes(result_records, paths)
    return [_make_pair(record, path) for record, path in zip(result_records, paths, strict=True)]


class _DataSetTruths:
    """The ground truth in a data set, by scene and by the photo's name."""

    def __init__(self, path: Path, records: Sequence[Record]):
        self.path = path
        self.records = records
        self._by_scene = _group_by(records, _scene_key)
        self._by_name = _group_by(records, lambda record: record.src.stem)

    def find(self, record: Record) -> Path | str:
        """Return the ground truth of a result, or a message that says why there is none."""
        matches = self._by_scene.get(_scene_key(record), [])
        matched_by_name = not matches
        if matched_by_name:
            matches = self._by_name.get(record.src.stem, [])
        if not matches:
            return f"no scene with photo {record.src} and mask {record.mask}, and no photo named {record.src.stem}"
        if len(matches) > 1 and any(match.source == "gt" for match in matches):
            matches = [match for match in matches if match.source == "gt"]
        if len({match.result.resolve() for match in matches}) > 1:
            names = _format_names(match.result for match in matches)
            return f"{len(matches)} results could be its ground truth ({names}): expected one, or one of source gt"
        if matched_by_name and not _same_mask(record.mask, matches[0].mask):
            return (
                f"photo {matches[0].src} has the same name, but mask {record.mask} shows another object than "
                f"{matches[0].mask}"
            )
        return matches[0].result


class _FolderTruths:
    """The ground truth in a plain folder of images, by the photo's name."""

    def __init__(self, path: Path, images: dict[str, list[Path]]):
        self.path = path
        self._images = images

    def find(self, record: Record) -> Path | str:
        """Return the ground truth of a result, or a message that says why there is none."""
        stem = record.src.stem
        matches = self._images.get(stem, [])
        if not matches:
            return f"no image with the name of its photo, {stem}"
        if len(matches) > 1:
            return f"{len(matches)} images have the name of its photo, {stem} ({_format_names(matches)}): expected one"
        return matches[0]


def _read_truths(path: Path) -> _DataSetTruths | _FolderTruths:
    _check_not_image(path, "--truth")
    check_not_pack(path, "truths and results are matched by file name")
    if not path.is_dir() or (path / "input").is_dir():
        return _DataSetTruths(path, load_records(path))
    images = images_by_stem(path)
    if not images:
        raise DataError(f"{path}: has neither input/ mask/ gt/ nor images; expected the ground truth of the results")
    return _FolderTruths(path, images)


def _read_results(path: Path, truths: _DataSetTruths | _FolderTruths | None, only: str | None) -> list[Record]:
    _check_not_image(path, "--results")
    check_not_pack(path, "truths and results are matched by file name")
    if (path / RECORDS_FILE).is_file():
        return load_records(path / RECORDS_FILE)
    if not path.is_dir() or (path / "input").is_dir():
        return load_records(path)
    images = images_by_stem(path)
    if not images:
        raise DataError(f"{path}: has no {RECORDS_FILE}, no input/ and no images; expected removals to measure")
    if not isinstance(truths, _DataSetTruths):
        raise DataError(
            f"{path}: a folder of images does not say which photos and masks they were made from; give a data set "
            f"(triplets) with photos of the same names as --truth, or give --results a data set or a folder with "
            f"{RECORDS_FILE}"
        )
    files = _match_names([file for same_stem in images.values() for file in same_stem], only)
    return _make_records(path, files, truths)


def _make_records(folder: Path, files: Sequence[Path], truths: _DataSetTruths) -> list[Record]:
    """Make a record for each image of a plain folder.

    Its photo and mask are from the scene whose photo has the same name as the image.
    """
    records_by_name = _group_by(truths.records, lambda record: record.src.stem)
    stem_counts = Counter(file.stem for file in files)
    entries, errors = [], []
    for number, file in enumerate(files):
        scenes = {_scene_key(record) for record in records_by_name.get(file.stem, [])}
        if len(scenes) != 1:
            errors.append(f"{file}: {len(scenes) or 'no'} scenes have a photo named {file.stem}: expected one")
            continue
        src, mask = scenes.pop()
        fields = {"id": file.name if stem_counts[file.stem] > 1 else file.stem, "source": "other"}
        fields |= {"src": str(src), "mask": str(mask), "result": str(file.resolve())}
        entries.append(Entry(number, fields))
    if errors:
        raise DataError(_format_errors(f"{truths.path}: no scene for {len(errors)} of {len(files)} results", errors))
    records, record_errors = check_entries(RawData(Path(), entries, []))
    if record_errors:
        raise DataError.from_errors(folder, record_errors)
    return records


def _match_names(results: Sequence[Path], only: str | None) -> Sequence[Path]:
    """Return the results whose file name, with or without its suffix, matches the glob `only`."""
    if only is None:
        return results
    selected = [path for path in results if fnmatch(path.name, only) or fnmatch(path.stem, only)]
    if not selected:
        raise DataError(f"--only {only!r}: matches none of {len(results)} results, such as {_format_names(results)}")
    return selected


def _check_sizes(records: Sequence[Record], truths: Sequence[Path]) -> None:
    sizes: dict[Path, Size | str] = {}
    for path in dict.fromkeys(truths):
        try:
            sizes[path] = verify_photo(path)
        except UNREADABLE_ERRORS as error:
            sizes[path] = f"image {path} cannot be read: {error}"
    errors = list(dict.fromkeys(size for size in sizes.values() if isinstance(size, str)))
    for record, path in zip(records, truths, strict=True):
        size = sizes[path]
        if not isinstance(size, str) and size != record.size:
            errors.append(
                f"{record.result} is {width_by_height(record.size)}, but its ground truth {path} is "
                f"{width_by_height(size)}: expected the same size (width × height)"
            )
    if errors:
        raise DataError(_format_errors("the ground truth cannot be compared with the results", errors))


def _make_pair(record: Record, truth: Path | None) -> Pair:
    return Pair(record.id, record.src, record.mask, record.result, truth, record.size)


def _scene_key(record: Record) -> tuple[Path, Path]:
    return record.src.resolve(), record.mask.resolve()


def _group_by(items: Iterable, key) -> dict:
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _same_mask(first: Path, second: Path) -> bool:
    mask1, mask2 = read_mask(first), read_mask(second)
    return mask1.shape != mask2.shape or (mask1 & mask2).sum() >= MIN_MASK_IOU * np.logical_or(mask1, mask2).sum()


def _check_not_image(path: Path, flag: str) -> None:
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        raise DataError(f"{flag} {path}: is an image; expected a data set or a folder of images")


def _format_names(paths: Iterable[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _format_errors(title: str, lines: Sequence[str]) -> str:
    shown = [f"  {line}" for line in lines[:MAX_ERRORS_SHOWN]]
    hidden = len(lines) - MAX_ERRORS_SHOWN
    return "\n".join([title, *shown, *([f"  … and {hidden} more"] if hidden > 0 else [])])
