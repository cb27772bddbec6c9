"""What a command writes: never a file or folder that it reads, and never half of a file.

`check_outputs` compares all that a command will write or delete with all that it reads, by resolved path and by inode,
before anything is computed, created or deleted. `replace_file`, `write_file` and `replace_folder` write beside the
target and rename: whoever reads the target meets the old content or the new one, also where the program is killed.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ra_jax.errors import OutputError

# What a command reads: the flag that names it -> files, and folders of which everything is read. Paths that do not
# exist are passed over.
Inputs = Mapping[str, Iterable[Path]]

UNFINISHED = ".unfinished"  # the file in a folder that is being written, with the content UNFINISHED_NOTE
UNFINISHED_NOTE = "ra_jax is writing this folder. If no run is at work on it, it was left by one that was stopped.\n"
MAX_NAME_BYTES = 255  # of a file's or folder's name, on the usual file systems
NAME_LENGTH = 40  # characters of a file's name that the draft beside it repeats: names are limited to 255 bytes


@dataclass(frozen=True)
class Outputs:
    """What a command writes or deletes, and the flag that names the place.

    flag: as messages name it, such as "--output_dir".
    folder: where the command writes; it need not exist. None where it writes single files only.
    files: written or deleted, each of which need not exist.
    owned: folders that the command deletes, or fills with files of any name.
    """

    flag: str
    folder: Path | None = None
    files: Sequence[Path] = ()
    owned: Sequence[Path] = ()


def check_outputs(outputs: Outputs, inputs: Inputs, nested: Inputs | None = None) -> None:
    """Check that no output is, holds or lies in what the command reads.

    nested: folders that are read and may lie in `outputs.folder`, as a run's checkpoint lies in the run's folder, where
    other results go, too. They may not lie in a folder of `outputs.owned`.

    Two paths are the same if they resolve to the same path or have the same device and inode, so that links, hard
    links, relative paths, bind mounts and file systems that ignore case make no difference.

    Raises:
        OutputError: an output file is an input file or lies in an input folder; the output folder is, holds or lies in
            an input folder; an owned folder holds any input or lies in an input folder. It names both paths and the
            input's flag. Also where the output folder is a file or a link that leads nowhere, where an output file is
            anything but a file, where a name is too long, and where no file can be created.
    """
    try:
        _check_names(outputs)
        _check_kinds(outputs)
        comparison = _Comparison(outputs)
        for flag, paths in inputs.items():
            for path in dict.fromkeys(paths):
                comparison.check(flag, Path(path), may_be_around=False)
        for flag, paths in (nested or {}).items():
            for path in paths:
                comparison.check(flag, Path(path), may_be_around=True)
        _check_writable(outputs)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, up to Python 3.12
        raise OutputError(f"{outputs.flag}: cannot be checked ({error}); choose another {outputs.flag}") from error


class _Comparison:
    """The outputs, and what was found out about paths; each folder is looked at once."""

    def __init__(self, outputs: Outputs):
        self.flag = outputs.flag
        self.chain = lru_cache(maxsize=None)(_chain)
        self.real = lru_cache(maxsize=None)(Path.resolve)
        self.files = {mark: file for file in outputs.files for mark in self.marks(file)}
        folders = [] if outputs.folder is None else [outputs.folder]
        self.folders = {folder: _marks(folder) for folder in folders}
        self.owned = {folder: _marks(folder) for folder in outputs.owned}
        # Each folder that is written to, and the output that messages name for it.
        self.places = {folder: folder for folder in (*folders, *outputs.owned)}
        for file in outputs.files:
            self.places.setdefault(file.parent, file)

    def marks(self, path: Path) -> set:
        """As `_marks`, but the folder's path is resolved once for all files in it."""
        if path.name in ("", "..") or path.is_symlink():
            return _marks(path)
        return _identity(self.real(path.parent) / path.name)

    def check(self, flag: str, path: Path, *, may_be_around: bool) -> None:
        """Raise OutputError where an output and this input are in each other's way."""
        if not path.exists():
            return
        own = self.marks(path)
        around = own | self.chain(path.parent) | (self.chain(path) if path.is_symlink() else set())
        for file in (self.files[mark] for mark in own if mark in self.files):
            self._refuse(file, "is the same file as", flag, path)
        if path.is_dir():
            self._check_folder(flag, path, own, set() if may_be_around else around)
        for folder, marks in self.owned.items():
            if around & marks:
                self._refuse(folder, "holds", flag, path)

    def _check_folder(self, flag: str, path: Path, own: set, around: set) -> None:
        for folder, marks in self.folders.items():
            if own & marks:
                self._refuse(folder, "is the same folder as", flag, path)
            if around & marks:
                self._refuse(folder, "holds", flag, path)
        for place, output in self.places.items():
            if own & self.chain(place):
                self._refuse(output, "lies in", flag, path)

    def _refuse(self, output: Path, relation: str, flag: str, path: Path) -> None:
        where = "is" if output == path else f"{relation} {path},"
        into = "into " if output in self.folders and output not in self.owned else ""
        raise OutputError(
            f"{self.flag}: would write {into}{output}, which {where} an input of {flag}{_how(output, path)}; no "
            f"command replaces or deletes what it reads: choose another {self.flag}, apart from its inputs"
        )


def _check_names(outputs: Outputs) -> None:
    """Raise OutputError where a name is longer than file systems allow."""
    for path in (*_places(outputs), *outputs.files):
        for name in path.parts:
            if (size := len(os.fsencode(name))) > MAX_NAME_BYTES:
                raise OutputError(
                    f"{outputs.flag}: would write {name}, a name of {size} bytes; expected at most {MAX_NAME_BYTES}: "
                    f"choose another {outputs.flag}, or shorten the name that it is made from"
                )


def _check_kinds(outputs: Outputs) -> None:
    """Raise OutputError where a folder is expected and something else lies, or where a file is, and it is none."""
    advice = f"choose another {outputs.flag}"
    for place in _places(outputs):
        there = _existing(place)
        if not there.exists():
            raise OutputError(f"{outputs.flag} {there}: is a link that leads nowhere; expected a folder: {advice}")
        if not there.is_dir():
            raise OutputError(f"{outputs.flag} {there}: is a file; expected a folder: {advice}")
    for file in outputs.files:
        if file.exists() and not file.is_file():
            kind = "folder" if file.is_dir() else "device, pipe or socket"
            raise OutputError(f"{outputs.flag}: {file} is a {kind} where a file is to be written: move it, or {advice}")


def _check_writable(outputs: Outputs) -> None:
    """Raise OutputError where no file can be created; whoever looks at the folders afterwards sees no change."""
    for folder in dict.fromkeys(map(_existing, _places(outputs))):
        before = folder.stat()
        probe = folder / f".{secrets.token_hex(8)}.tmp"
        try:
            probe.open("xb").close()
        except OSError as error:
            raise OutputError(
                f"{outputs.flag}: no file can be created in {folder} ({error.strerror}): choose another {outputs.flag}"
            ) from error
        probe.unlink()
        with suppress(PermissionError):  # only the folder's owner may set its times
            os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))


def _places(outputs: Outputs) -> list[Path]:
    """The folders that files are written into, `owned`, and the ones around them, each once."""
    folders = [*([] if outputs.folder is None else [outputs.folder]), *outputs.owned]
    return list(dict.fromkeys([*folders, *(path.parent for path in (*outputs.files, *outputs.owned))]))


def _existing(place: Path) -> Path:
    """The path itself, or the nearest one around it, where anything lies; a link counts, wherever it leads."""
    return next(path for path in (place, *place.parents, Path()) if os.path.lexists(path))


def _marks(path: Path) -> set:
    """What identifies a path: its resolved form and, where something is there, device and inode."""
    return _identity(path.resolve())


def _identity(resolved: Path) -> set:
    try:
        status = resolved.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {resolved}
    return {resolved, (status.st_dev, status.st_ino)}


def _chain(path: Path) -> set:
    """The marks of a path, of all folders around it, and of those around the links that lead to it."""
    path = path.absolute()
    links = [part.parent.resolve() / part.name for part in (path, *path.parents) if part.is_symlink()]
    around = {folder for link in links for folder in link.parents}
    resolved = path.resolve()
    return set().union(*(_marks(folder) for folder in {resolved, *resolved.parents, *around}))


def _how(output: Path, path: Path) -> str:
    """By what two paths are related, where that does not show in how they are spelt."""

    def related(one: Path, other: Path) -> bool:
        return one == other or one in other.parents or other in one.parents

    if related(Path(os.path.abspath(output)), Path(os.path.abspath(path))):
        return ""
    if related(output.resolve(), path.resolve()):
        return " (through a link)"
    return " (under another name)" if path.is_dir() else " (by a hard link)"


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path` to write to; it takes the name `path` when the block ends.

    Where the block raises, the draft goes and `path` stays as it was. A link at `path` is replaced, not followed. The
    draft's name cannot be foreseen and ends in `.tmp`; name a format where one is guessed from the ending. Permissions
    are those of the file that is replaced, or of any new file.
    """
    draft = path.with_name(f".{path.name[:NAME_LENGTH]}.{secrets.token_hex(8)}.tmp")
    draft.open("xb").close()
    mode = (path if path.is_file() and not path.is_symlink() else draft).stat().st_mode
    try:
        yield draft
        if draft.stat().st_mode != mode:  # some libraries replace the draft by a file of their own
            draft.chmod(stat.S_IMODE(mode))
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: str | bytes) -> None:
    """Write bytes, or text as UTF-8, as `replace_file` does."""
    with replace_file(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder` to write to; it takes the name `folder` when the block ends.

    A `folder` that is there is deleted then. Where the block or a rename raises, what was written goes, and `folder` is
    as before. What a killed run left is deleted at the beginning.

    Raises:
        OutputError: as `check_staging` does.
    """
    check_staging(folder)
    staging = staging_folder(folder)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    old = None
    try:
        (staging / UNFINISHED).write_text(UNFINISHED_NOTE, encoding="utf-8")
        yield staging
        (staging / UNFINISHED).unlink()
        if folder.exists():
            old = folder.rename(folder.with_name(f".{folder.name[:NAME_LENGTH]}.{secrets.token_hex(8)}.old"))
        staging.rename(folder)
    except BaseException:
        if old is not None and not folder.exists():
            old.rename(folder)
        if staging.exists():
            shutil.rmtree(staging)
        raise
    if old is not None:
        shutil.rmtree(old)


def staging_folder(folder: Path) -> Path:
    """Where `replace_folder` writes until everything is there: FOLDER.partial."""
    return folder.with_name(f"{folder.name}.partial")


def check_staging(folder: Path) -> None:
    """Check that `staging_folder(folder)` is not there, or was left by a run that was killed.

    Raises:
        OutputError: `replace_folder` would delete what it did not write, or cannot rename `folder`, a mount point.
    """
    if os.path.ismount(folder):
        raise OutputError(f"{folder}: is a mount point, which no other folder can replace; choose a new folder in it")
    staging = staging_folder(folder)
    note = staging / UNFINISHED
    left = staging.is_dir() and not staging.is_symlink() and note.is_file()
    left = left and note.read_bytes() == UNFINISHED_NOTE.encode()
    if not left and (staging.exists() or staging.is_symlink()):
        raise OutputError(
            f"{staging}: {folder} is written under this name first, but what lies there was not left by a run that "
            "was stopped, and is not deleted; move it, or choose another output"
        )
