"""Pairs of a result and its ground truth, which is found by scene or by name.

All files are checked here, before anything is computed: whether they can be read, whether sizes agree, and whether
every result has a ground truth.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from ra_jax.data.formats import RECORDS, Entry, RawData, pictures_by_stem
from ra_jax.data.images import SUFFIXES, UNREADABLE, Size, probe_photo, read_mask, width_by_height
from ra_jax.data.packs import check_not_pack
from ra_jax.data.records import Record, check_entries, load_records
from ra_jax.errors import MAX_ERRORS_SHOWN, DataError

SAME_MASK = 0.5  # two masks with at least this intersection over union count as masks of the same object


@dataclass(frozen=True)
class Pair:
    """A result with its photo, mask and ground truth, all of the same size.

    Attributes:
        id: the id of the result's record.
        src: the photo that the result was made from.
        mask: the mask that the result was made with.
        result: the result.
        truth: the ground truth; None if there is none.
        size: (height, width) of the upright photo in pixels.
    """

    id: str
    src: Path
    mask: Path
    result: Path
    truth: Path | None
    size: Size


def find_pairs(results: str | Path, truth: str | Path | None = None, only: str | None = None) -> list[Pair]:
    """Returns every result to measure, with its ground truth.

    Args:
        results: one of
            - a data set in any form except a pack,
            - a folder that `python -m ra_jax.infer` wrote,
            - a plain folder of images with the names of the photos in `truth`, which must be a data set then.
            Records of source `gt` are not measured. If `truth` is None, they are the ground truth of their scenes.
        truth: one of
            - a data set in any form except a pack. Each scene has one result, or one of source `gt` among several.
              It is matched by scene (the same photo and mask files), else by the photo's name if the masks agree.
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
    judged = [record for record in records if record.source != "gt"]
    if not judged:
        raise DataError(f"{results}: every record is of source gt: expected results to compare with the ground truth")
    kept = set(_kept([record.result for record in judged], only))
    judged = [record for record in judged if record.result in kept]
    if truths is None:
        known = [record for record in records if record.source == "gt"]
        truths = _Truths(results, known) if known else None
    if truths is None:
        return [_pair(record, None) for record in judged]
    found = [truths.of(record) for record in judged]
    errors = [f"{record.result}: {path}" for record, path in zip(judged, found, strict=True) if isinstance(path, str)]
    if errors:
        raise DataError(_listing(f"{truths.path}: no ground truth for {len(errors)} of {len(judged)} results", errors))
    _check_sizes(judged, found)
    return [_pair(record, path) for record, path in zip(judged, found, strict=True)]


class _Truths:
    """The ground truth of a data set, by scene and by the photo's name."""

    def __init__(self, path: Path, records: Sequence[Record]):
        self.path = path
        self.records = records
        self._scenes = _grouped(records, _scene)
        self._names = _grouped(records, lambda record: record.src.stem)

    def of(self, record: Record) -> Path | str:
        """Returns the ground truth of a result, or a message that says why there is none."""
        same = self._scenes.get(_scene(record), [])
        by_name = not same
        if by_name:
            same = self._names.get(record.src.stem, [])
        if not same:
            return f"no scene of photo {record.src} and mask {record.mask}, and no photo named {record.src.stem}"
        if len(same) > 1 and any(one.source == "gt" for one in same):
            same = [one for one in same if one.source == "gt"]
        if len({one.result.resolve() for one in same}) > 1:
            return f"{len(same)} results could be its ground truth ({_names(one.result for one in same)}): expected one"
        if by_name and not _same_mask(record.mask, same[0].mask):
            named = f"the photo's name is that of {same[0].src}"
            return f"{named}, but mask {record.mask} shows another object than {same[0].mask}"
        return same[0].result


class _NamedPictures:
    """The ground truth of a plain folder of images, by the photo's name."""

    def __init__(self, path: Path, pictures: dict[str, list[Path]]):
        self.path = path
        self._pictures = pictures

    def of(self, record: Record) -> Path | str:
        """Returns the ground truth of a result, or a message that says why there is none."""
        found = self._pictures.get(record.src.stem, [])
        if not found:
            return f"no picture named {record.src.stem}, as its photo is"
        return found[0] if len(found) == 1 else f"{len(found)} pictures of its photo's name ({_names(found)})"


def _read_truths(path: Path) -> _Truths | _NamedPictures:
    _refuse_picture(path, "--truth")
    check_not_pack(path, "truths and results are matched by")
    if not path.is_dir() or (path / "input").is_dir():
        return _Truths(path, load_records(path))
    pictures = pictures_by_stem(path)
    if not pictures:
        raise DataError(
            f"{path}: neither input/ mask/ gt/ nor pictures in it: expected the ground truth of the results"
        )
    return _NamedPictures(path, pictures)


def _read_results(path: Path, truths: _Truths | _NamedPictures | None, only: str | None) -> list[Record]:
    _refuse_picture(path, "--results")
    check_not_pack(path, "truths and results are matched by")
    if (path / RECORDS).is_file():
        return load_records(path / RECORDS)
    if not path.is_dir() or (path / "input").is_dir():
        return load_records(path)
    pictures = pictures_by_stem(path)
    if not pictures:
        raise DataError(f"{path}: no {RECORDS}, no input/ and no pictures in it: expected results of removing objects")
    if not isinstance(truths, _Truths):
        raise DataError(
            f"{path}: a folder of pictures, which says nothing of their photos and masks; give a data set (triplets) "
            f"as --truth, with photos of these names, or a data set or a folder with {RECORDS} as --results"
        )
    files = _kept([file for same_stem in pictures.values() for file in same_stem], only)
    return _named_results(path, files, truths)


def _named_results(folder: Path, files: Sequence[Path], truths: _Truths) -> list[Record]:
    """Makes a record for each image of a plain folder, with photo and mask of the scene whose photo has its name."""
    scenes = _grouped(truths.records, lambda record: record.src.stem)
    stems = Counter(file.stem for file in files)
    entries, errors = [], []
    for number, file in enumerate(files):
        masks = {_scene(record) for record in scenes.get(file.stem, [])}
        if len(masks) != 1:
            errors.append(f"{file}: {len(masks) or 'no'} scenes whose photo is named {file.stem}: expected one")
            continue
        src, mask = masks.pop()
        fields = {"id": file.name if stems[file.stem] > 1 else file.stem, "source": "other"}
        fields |= {"src": str(src), "mask": str(mask), "result": str(file.resolve())}
        entries.append(Entry(number, fields))
    if errors:
        raise DataError(_listing(f"{truths.path}: no scene for {len(errors)} of {len(files)} results", errors))
    records, wrong = check_entries(RawData(Path(), entries, []))
    if wrong:
        raise DataError.from_errors(folder, wrong)
    return records


def _kept(results: Sequence[Path], only: str | None) -> Sequence[Path]:
    """Returns the results whose file name, with or without its ending, matches the glob `only`."""
    if only is None:
        return results
    kept = [path for path in results if fnmatch(path.name, only) or fnmatch(path.stem, only)]
    if not kept:
        raise DataError(f"--only {only!r}: matches none of {len(results)} results, such as {_names(results)}")
    return kept


def _check_sizes(judged: Sequence[Record], found: Sequence[Path]) -> None:
    sizes: dict[Path, Size | str] = {}
    for path in dict.fromkeys(found):
        try:
            sizes[path] = probe_photo(path)
        except UNREADABLE as error:
            sizes[path] = f"unreadable picture {path}: {error}"
    errors = list(dict.fromkeys(size for size in sizes.values() if isinstance(size, str)))
    for record, path in zip(judged, found, strict=True):
        size = sizes[path]
        if not isinstance(size, str) and size != record.size:
            errors.append(
                f"{record.result} is {width_by_height(record.size)}, but its ground truth {path} is "
                f"{width_by_height(size)}: expected the same size (width × height)"
            )
    if errors:
        raise DataError(_listing("ground truth that cannot be compared with", errors))


def _pair(record: Record, truth: Path | None) -> Pair:
    return Pair(record.id, record.src, record.mask, record.result, truth, record.size)


def _scene(record: Record) -> tuple[Path, Path]:
    return record.src.resolve(), record.mask.resolve()


def _grouped(items: Iterable, key) -> dict:
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _same_mask(first: Path, second: Path) -> bool:
    one, other = read_mask(first), read_mask(second)
    return one.shape != other.shape or (one & other).sum() >= SAME_MASK * np.logical_or(one, other).sum()


def _refuse_picture(path: Path, flag: str) -> None:
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        raise DataError(f"{flag} {path}: a picture; expected a data set or a folder of pictures")


def _names(paths: Iterable[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _listing(head: str, lines: Sequence[str]) -> str:
    shown = [f"  {line}" for line in lines[:MAX_ERRORS_SHOWN]]
    hidden = len(lines) - MAX_ERRORS_SHOWN
    return "\n".join([head, *shown, *([f"  … and {hidden} more"] if hidden > 0 else [])])
