"""Outputs that cannot be written: the main() of each command reports them before it changes anything."""

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ra_jax import evaluate, infer
from ra_jax.data import __main__ as data
from ra_jax.data.synthetic import DatasetSettings, write_dataset
from ra_jax.outputs import UNFINISHED, UNFINISHED_NOTE


@dataclass(frozen=True)
class Command:
    """A command: its main(), its arguments up to the output folder, and a file that it writes into that folder."""

    main: Callable
    arguments: str
    output_file: str | None


COMMANDS = {
    "infer": Command(infer.main, "--source_image set/triplets.json --overwrite --output_dir", "scene_00000_0.png"),
    "evaluate": Command(
        evaluate.main,
        "--results set/result --truth set/triplets.json --overwrite --output_dir",
        "summary.json",
    ),
    "pack": Command(data.main, "pack set/triplets.json", None),
    "synth": Command(data.main, "synth --scenes 1 --size 32", None),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a data set in set/."""
    monkeypatch.chdir(tmp_path)
    return write_dataset("set", DatasetSettings(scenes=1, size=32, mix="one_clean", seed=0)).parent


def tree_state(root):
    """Return mode, time, inode, and content or link target of `root` and of everything below it, by path."""
    entries = {}
    for path in (root, *sorted(root.rglob("*"))):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        entries[path] = (status.st_mode, status.st_mtime_ns, status.st_ino, content)
    return entries


def fail_safely(command, output, capsys):
    """Run a command that must fail without changing anything, and return its message."""
    main, arguments = COMMANDS[command].main, COMMANDS[command].arguments
    before = tree_state(Path())
    try:
        status = main([*arguments.split(), str(output)])
    except SystemExit as end:
        message = end.code
    else:
        assert status == 1
        message = capsys.readouterr().err
    assert tree_state(Path()) == before
    assert message.startswith("error: ")
    return message


def create_locked_folder(monkeypatch):
    """Create the folder locked/, in which no file can be created. Permissions alone would not stop root."""
    Path("locked").mkdir()
    original_open = Path.open

    def open_unless_locked(path, mode="r", *arguments, **settings):
        if "locked" in path.parts and mode.startswith("x"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return original_open(path, mode, *arguments, **settings)

    monkeypatch.setattr(Path, "open", open_unless_locked)


@pytest.mark.parametrize("output", ["{}", "{}/new", "{}/new/newer"])
@pytest.mark.parametrize("link", ["loop", "dangling", "two_links"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_link_is_refused(folder, command, link, output, capsys):
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    Path("two_links").symlink_to("dangling")
    expected = f"{link}: is a broken symbolic link; expected a folder"
    assert expected in fail_safely(command, output.format(link), capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_parent_folder_that_is_a_file_is_refused(folder, command, capsys):
    assert "set/triplets.json: is a file; expected a folder" in fail_safely(command, "set/triplets.json/x", capsys)


@pytest.mark.parametrize("output", ["locked", "locked/new"])
@pytest.mark.parametrize("command", ["infer", "evaluate"])
def test_a_folder_in_which_no_file_can_be_created_is_refused(folder, command, output, monkeypatch, capsys):
    create_locked_folder(monkeypatch)
    expected = f"no file can be created in {Path('locked')} (Read-only file system): choose another --output_dir"
    assert expected in fail_safely(command, output, capsys)


@pytest.mark.parametrize("command", ["pack", "synth"])
def test_a_parent_folder_in_which_no_file_can_be_created_is_refused(folder, command, monkeypatch, capsys):
    create_locked_folder(monkeypatch)
    assert "locked (Read-only file system): choose another FOLDER" in fail_safely(command, "locked/new", capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_is_too_long_is_refused(folder, command, capsys):
    name = "a" * 256
    assert f"would write {name}, a name of 256 bytes; expected at most 255" in fail_safely(command, name, capsys)
    assert "a name of 256 bytes" in fail_safely(command, f"new/{name}/newer", capsys)
    if command in ("pack", "synth"):  # they first write FOLDER.partial
        assert "a name of 258 bytes" in fail_safely(command, "a" * 250, capsys)


def test_a_photo_name_that_becomes_too_long_with_the_seed_is_refused(folder, capsys):
    photo = f"{'ä' * 125}.png"  # 254 bytes
    Path("set/input/scene_00000.png").rename(photo)
    with pytest.raises(SystemExit) as caught:
        infer.main(["--source_image", photo, "--source_mask", "set/mask/scene_00000.png", "--output_dir", "out"])
    assert "a name of 256 bytes" in caught.value.code
    assert not Path("out").exists()


@pytest.mark.parametrize("content", [None, "", "a list of the user's"])
@pytest.mark.parametrize("command", ["pack", "synth"])
def test_a_staging_folder_that_no_run_wrote_is_not_replaced(folder, command, content, capsys):
    Path("made.partial").mkdir()
    if content is not None:
        Path("made.partial", UNFINISHED).write_text(content)
    expected = "made.partial: {}made is first written under this name, but it already exists and is not the unfinished"
    assert expected.format("" if command == "pack" else f"{folder}/") in fail_safely(command, "made", capsys)


def test_data_in_the_staging_folder_of_a_pack_are_not_replaced(folder, capsys):
    Path("set").rename("packed.partial")
    Path("packed.partial", UNFINISHED).write_text(UNFINISHED_NOTE)
    before = tree_state(Path())
    assert data.main(["pack", "packed.partial/triplets.json", "packed"]) == 1
    assert "would write packed.partial, which contains packed.partial/triplets.json" in capsys.readouterr().err
    assert tree_state(Path()) == before


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("command", ["infer", "evaluate"])
def test_pipes_sockets_and_devices_are_not_replaced(folder, command, kind, capsys):
    Path("out").mkdir()
    target = Path("out", COMMANDS[command].output_file)
    match kind:
        case "pipe":
            os.mkfifo(target)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(target))
        case "device":
            target.symlink_to(os.devnull)
    assert f"{target} is a device, pipe or socket; expected a file or no file" in fail_safely(command, "out", capsys)


def test_a_pipe_named_records_json_is_not_read(folder, capsys):
    Path("out").mkdir()
    os.mkfifo("out/records.json")
    assert "out/records.json is a device, pipe or socket" in fail_safely("infer", "out", capsys)
