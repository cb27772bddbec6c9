"""Checks that a command does not overwrite its inputs, and functions that replace files and folders atomically.

`check_outputs` compares all paths that a command will write or delete with all paths that it reads, by resolved path
and by inode. Commands call it before they compute, create or delete anything. `replace_file`, `write_file` and
`replace_folder` write beside the target and then rename. A reader of the target gets the complete old content or the
complete new content, even if the program is killed.
"""

import errno
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

# The inputs of a command: flag -> files and folders that the flag names. A folder stands for everything in it. Paths
# that do not exist are ignored.
Inputs = Mapping[str, Iterable[Path]]

UNFINISHED = ".unfinished"  # marks a folder that is being written; the file contains UNFINISHED_NOTE
UNFINISHED_NOTE = "ra_jax is writing this folder. If no run is at work on it, it was left by one that was stopped.\n"
MAX_NAME_BYTES = 255  # limit of common file systems for the name of a file or folder
# A draft (temporary file) starts its name with this many characters of the final name, which keeps the name of the
# draft shorter than MAX_NAME_BYTES.
DRAFT_NAME_LENGTH = 40


@dataclass(frozen=True)
class Outputs:
    """The paths that a command writes or deletes. They need not exist.

    Attributes:
        flag: the flag that names the output in messages, such as "--output_dir".
        folder: the folder that the command writes to; None if it writes only single files.
        files: files that the command writes or deletes.
        owned: folders that the command deletes, or in which it writes files of any name.
    """

    flag: str
    folder: Path | None = None
    files: Sequence[Path] = ()
    owned: Sequence[Path] = ()


def check_outputs(outputs: Outputs, inputs: Inputs, nested: Inputs | None = None) -> None:
    """Check that no output is an input, contains an input folder, or is inside an input folder.

    Two paths are the same if they resolve to the same path, or have the same device and inode. This covers symbolic
    links, hard links, relative paths, bind mounts and file systems that ignore case.

    Args:
        outputs: the paths that the command writes.
        inputs: the paths that the command reads.
        nested: inputs that may be inside `outputs.folder`, but not inside a folder of `outputs.owned`. An example is
            the checkpoint of a run, because other commands may write their results to the run's folder, too.

    Raises:
        OutputError: one of the following holds. If an input is involved, the message names both paths and the input's
            flag.

            * An output file is an input file, or is inside an input folder.
            * The output folder is an input folder, contains one, or is inside one.
            * An owned folder contains an input, or is inside an input folder.
            * The output folder is a file or a broken symbolic link.
            * An output file exists and is not a regular file.
            * The name of an output is too long.
            * No file can be created in an output folder.
    """
    try:
        _check_names(outputs)
        _check_kinds(outputs)
        comparison = _Comparison(outputs)
        for flag, paths in inputs.items():
            for path in dict.fromkeys(paths):
                comparison.check(flag, Path(path), is_nested=False)
        for flag, paths in (nested or {}).items():
            for path in paths:
                comparison.check(flag, Path(path), is_nested=True)
        _check_writable(outputs)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links, up to Python 3.12
        raise OutputError(
            f"{outputs.flag}: the path cannot be checked ({error}); choose another {outputs.flag}"
        ) from error


class _Comparison:
    """Compares the inputs with the outputs. Caches ensure that each folder is resolved only once."""

    def __init__(self, outputs: Outputs):
        self.flag = outputs.flag
        self.ancestor_ids = lru_cache(maxsize=None)(_ancestor_ids)
        self.resolve = lru_cache(maxsize=None)(Path.resolve)
        self.files = {path_id: file for file in outputs.files for path_id in self.path_ids(file)}
        folders = [] if outputs.folder is None else [outputs.folder]
        self.folders = {folder: _path_ids(folder) for folder in folders}
        self.owned = {folder: _path_ids(folder) for folder in outputs.owned}
        # Maps a folder that the command writes to, to the output that error messages name for it.
        self.output_in = {folder: folder for folder in (*folders, *outputs.owned)}
        for file in outputs.files:
            self.output_in.setdefault(file.parent, file)

    def path_ids(self, path: Path) -> set:
        """Return the same as `_path_ids`, but resolve a folder only once for all files in it."""
        if path.name in ("", "..") or path.is_symlink():
            return _path_ids(path)
        return _resolved_path_ids(self.resolve(path.parent) / path.name)

    def check(self, flag: str, path: Path, *, is_nested: bool) -> None:
        """Raise OutputError if an output overlaps the input `path` of `flag`.

        is_nested: whether the output folder may contain the input.
        """
        if not path.exists():
            return
        path_ids = self.path_ids(path)
        ancestor_ids = path_ids | self.ancestor_ids(path.parent)
        if path.is_symlink():
            ancestor_ids |= self.ancestor_ids(path)
        for file in (self.files[path_id] for path_id in path_ids if path_id in self.files):
            self._raise_overlap(file, "is the same file as", flag, path)
        if path.is_dir():
            self._check_folder(flag, path, path_ids, set() if is_nested else ancestor_ids)
        for folder, folder_ids in self.owned.items():
            if ancestor_ids & folder_ids:
                self._raise_overlap(folder, "contains", flag, path)

    def _check_folder(self, flag: str, path: Path, path_ids: set, ancestor_ids: set) -> None:
        for folder, folder_ids in self.folders.items():
            if path_ids & folder_ids:
                self._raise_overlap(folder, "is the same folder as", flag, path)
            if ancestor_ids & folder_ids:
                self._raise_overlap(folder, "contains", flag, path)
        for folder, output in self.output_in.items():
            if path_ids & self.ancestor_ids(folder):
                self._raise_overlap(output, "is inside", flag, path)

    def _raise_overlap(self, output: Path, relation: str, flag: str, path: Path) -> None:
        verb = "is" if output == path else f"{relation} {path},"
        into = "into " if output in self.folders and output not in self.owned else ""
        raise OutputError(
            f"{self.flag}: would write {into}{output}, which {verb} an input of {flag}"
            f"{_hidden_relation(output, path)}; inputs are never replaced or deleted: choose another {self.flag} that "
            "does not overlap the inputs"
        )


def _check_names(outputs: Outputs) -> None:
    """Raise OutputError if the name of an output is longer than file systems allow."""
    for path in (*_folders(outputs), *outputs.files):
        for name in path.parts:
            if (size := len(os.fsencode(name))) > MAX_NAME_BYTES:
                raise OutputError(
                    f"{outputs.flag}: would write {name}, a name of {size} bytes; expected at most {MAX_NAME_BYTES}: "
                    f"choose another {outputs.flag}, or shorten the file name that this name is derived from"
                )


def _check_kinds(outputs: Outputs) -> None:
    """Raise OutputError if a path has the wrong kind.

    A file or a broken link must not be in the place of a folder. An existing output file must be a regular file.
    """
    advice = f"choose another {outputs.flag}"
    for folder in _folders(outputs):
        path = _nearest_existing(folder)
        if not path.exists():
            raise OutputError(f"{outputs.flag} {path}: is a broken symbolic link; expected a folder: {advice}")
        if not path.is_dir():
            raise OutputError(f"{outputs.flag} {path}: is a file; expected a folder: {advice}")
    for file in outputs.files:
        if file.exists() and not file.is_file():
            kind = "folder" if file.is_dir() else "device, pipe or socket"
            raise OutputError(f"{outputs.flag}: {file} is a {kind}; expected a file or no file: move it, or {advice}")


def _check_writable(outputs: Outputs) -> None:
    """Raise OutputError if no file can be created in an output folder. The check leaves the folders unchanged."""
    for folder in dict.fromkeys(map(_nearest_existing, _folders(outputs))):
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


def _folders(outputs: Outputs) -> list[Path]:
    """Return the output folder, the owned folders, and the parent folders of files and owned folders, each once."""
    folders = [*([] if outputs.folder is None else [outputs.folder]), *outputs.owned]
    return list(dict.fromkeys([*folders, *(path.parent for path in (*outputs.files, *outputs.owned))]))


def _nearest_existing(path: Path) -> Path:
    """Return the path if it exists, else its nearest existing parent folder. Broken links count as existing."""
    return next(candidate for candidate in (path, *path.parents, Path()) if os.path.lexists(candidate))


def _path_ids(path: Path) -> set:
    """Return everything that identifies a path: the resolved path and, if it exists, (device, inode)."""
    return _resolved_path_ids(path.resolve())


def _resolved_path_ids(resolved: Path) -> set:
    try:
        status = resolved.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {resolved}
    return {resolved, (status.st_dev, status.st_ino)}


def _ancestor_ids(path: Path) -> set:
    """Return `_path_ids` of a path, of its parent folders, and of the parent folders of symbolic links in the path."""
    path = path.absolute()
    links = [part.parent.resolve() / part.name for part in (path, *path.parents) if part.is_symlink()]
    link_parents = {folder for link in links for folder in link.parents}
    resolved = path.resolve()
    return set().union(*(_path_ids(folder) for folder in {resolved, *resolved.parents, *link_parents}))


def _hidden_relation(output: Path, path: Path) -> str:
    """Return " (through a link)" or similar for a message; "" if the two paths themselves show how they are related."""

    def overlap(first: Path, second: Path) -> bool:
        return first == second or first in second.parents or second in first.parents

    if overlap(Path(os.path.abspath(output)), Path(os.path.abspath(path))):
        return ""
    if overlap(output.resolve(), path.resolve()):
        return " (through a link)"
    return " (under another name)" if path.is_dir() else " (by a hard link)"


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield an empty draft file beside `path`, and rename it to `path` when the block ends.

    If the block raises, the draft is deleted and `path` stays unchanged. A symbolic link at `path` is replaced, not
    followed. The file keeps the permissions of the file that it replaces; a new file gets the default permissions.

    The draft has a random name that ends in `.tmp`. A library that derives the file format from the suffix of the name
    needs the format as an argument.
    """
    draft = path.with_name(f".{path.name[:DRAFT_NAME_LENGTH]}.{secrets.token_hex(8)}.tmp")
    draft.open("xb").close()
    mode = (path if path.is_file() and not path.is_symlink() else draft).stat().st_mode
    try:
        yield draft
        if draft.stat().st_mode != mode:  # some libraries replace the draft by a new file
            draft.chmod(stat.S_IMODE(mode))
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: str | bytes) -> None:
    """Write bytes or text (as UTF-8) to `path`, by `replace_file`."""
    with replace_file(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Context manager that replaces the error of a full disk in its block by an OutputError that says what to do.

    Orbax raises ValueError with the text of the operating system's error, and everything else OSError.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if not any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise OutputError(
            f"{folder}: the disk is full, or its quota is used up: complete checkpoints are unharmed; make room, then "
            "continue with --resume_from_checkpoint latest"
        ) from error


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, and rename it to `folder` when the block ends.

    The rename replaces an existing `folder`. If the block or a rename raises, the new folder is deleted and `folder`
    stays unchanged. The unfinished folder of a killed run is deleted first.

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
            old = folder.rename(folder.with_name(f".{folder.name[:DRAFT_NAME_LENGTH]}.{secrets.token_hex(8)}.old"))
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
    """Return the folder that `replace_folder` writes to before it renames it: FOLDER.partial."""
    return folder.with_name(f"{folder.name}.partial")


def check_staging(folder: Path) -> None:
    """Check that `staging_folder(folder)` does not exist, or is the unfinished folder of a killed run.

    Raises:
        OutputError: `staging_folder(folder)` exists but `replace_folder` did not write it, or `folder` is a mount
            point, which cannot be renamed.
    """
    if os.path.ismount(folder):
        raise OutputError(f"{folder}: is a mount point, which cannot be replaced; choose a new folder inside it")
    staging = staging_folder(folder)
    note = staging / UNFINISHED
    is_unfinished = staging.is_dir() and not staging.is_symlink() and note.is_file()
    is_unfinished = is_unfinished and note.read_bytes() == UNFINISHED_NOTE.encode()
    if not is_unfinished and (staging.exists() or staging.is_symlink()):
        raise OutputError(
            f"{staging}: {folder} is first written under this name, but it already exists and is not the unfinished "
            "folder of a stopped run, so it is not deleted; move it, or choose another output"
        )
