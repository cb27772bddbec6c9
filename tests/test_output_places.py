"""Outputs that cannot be written: the main() of each command reports them before it changes anything."""

import errno
import os
import socket
from pathlib import Path

import pytest

from ra_jax import evaluate, infer
from ra_jax.data import __main__ as data
from ra_jax.data.synthetic import DatasetSettings, write_dataset
from ra_jax.outputs import UNFINISHED, UNFINISHED_NOTE

# By command: its main(), its arguments up to the output folder, and a file that it writes there.
COMMANDS = {
    "infer": (infer.main, "--source_image set/triplets.json --overwrite --output_dir", "scene_00000_0.png"),
    "evaluate": (
        evaluate.main,
        "--results set/result --truth set/triplets.json --overwrite --output_dir",
        "summary.json",
    ),
    "pack": (data.main, "pack set/triplets.json", None),
    "synth": (data.main, "synth --scenes 1 --size 32", None),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a data set in set/."""
    monkeypatch.chdir(tmp_path)
    return write_dataset("set", DatasetSettings(scenes=1, size=32, mix="one_clean", seed=0)).parent


def tree(root):
    """Return mode, time, inode, and content or link target of `root` and of everything below it, by path."""
    found = {}
    for path in (root, *sorted(root.rglob("*"))):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[path] = (status.st_mode, status.st_mtime_ns, status.st_ino, content)
    return found


def refused(command, output, capsys):
    """Run a command that must fail without changing anything, and return its message."""
    main, words, _ = COMMANDS[command]
    before = tree(Path())
    try:
        status = main([*words.split(), str(output)])
    except SystemExit as end:
        message = end.code
    else:
        assert status == 1
        message = capsys.readouterr().err
    assert tree(Path()) == before
    assert message.startswith("error: ")
    return message


def lock(monkeypatch):
    """Create the folder locked/, in which no file can be created. Permissions alone would not stop root."""
    Path("locked").mkdir()
    opened = Path.open

    def open_unless_locked(path, mode="r", *arguments, **settings):
        if "locked" in path.parts and mode.startswith("x"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, mode, *arguments, **settings)

    monkeypatch.setattr(Path, "open", open_unless_locked)


@pytest.mark.parametrize("output", ["{}", "{}/new", "{}/new/newer"])
@pytest.mark.parametrize("place", ["loop", "dangling", "two_links"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_link(folder, command, place, output, capsys):
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    Path("two_links").symlink_to("dangling")
    expected = f"{place}: is a broken symbolic link; expected a folder"
    assert expected in refused(command, output.format(place), capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_in_the_place_of_a_parent_folder(folder, command, capsys):
    assert "set/triplets.json: is a file; expected a folder" in refused(command, "set/triplets.json/x", capsys)


@pytest.mark.parametrize("output", ["locked", "locked/new"])
@pytest.mark.parametrize("command", ["infer", "evaluate"])
def test_a_folder_in_which_no_file_can_be_created(folder, command, output, monkeypatch, capsys):
    lock(monkeypatch)
    expected = f"no file can be created in {Path('locked')} (Read-only file system): choose another --output_dir"
    assert expected in refused(command, output, capsys)


@pytest.mark.parametrize("command", ["pack", "synth"])
def test_a_parent_folder_in_which_no_file_can_be_created(folder, command, monkeypatch, capsys):
    lock(monkeypatch)
    assert "locked (Read-only file system): choose another FOLDER" in refused(command, "locked/new", capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_is_too_long(folder, command, capsys):
    name = "a" * 256
    assert f"would write {name}, a name of 256 bytes; expected at most 255" in refused(command, name, capsys)
    assert "a name of 256 bytes" in refused(command, f"new/{name}/newer", capsys)
    if command in ("pack", "synth"):  # they first write FOLDER.partial
        assert "a name of 258 bytes" in refused(command, "a" * 250, capsys)


def test_a_photos_name_that_is_too_long_with_a_seed(folder, capsys):
    photo = f"{'ä' * 125}.png"  # 254 bytes
    Path("set/input/scene_00000.png").rename(photo)
    with pytest.raises(SystemExit) as caught:
        infer.main(["--source_image", photo, "--source_mask", "set/mask/scene_00000.png", "--output_dir", "out"])
    assert "a name of 256 bytes" in caught.value.code
    assert not Path("out").exists()


@pytest.mark.parametrize("content", [None, "", "a list of the user's"])
@pytest.mark.parametrize("command", ["pack", "synth"])
def test_a_staging_folder_that_no_run_wrote(folder, command, content, capsys):
    Path("made.partial").mkdir()
    if content is not None:
        Path("made.partial", UNFINISHED).write_text(content)
    expected = "made.partial: {}made is first written under this name, but it already exists and is not the unfinished"
    assert expected.format("" if command == "pack" else f"{folder}/") in refused(command, "made", capsys)


def test_the_staging_folder_of_a_pack_contains_the_data(folder, capsys):
    Path("set").rename("packed.partial")
    Path("packed.partial", UNFINISHED).write_text(UNFINISHED_NOTE)
    before = tree(Path())
    assert data.main(["pack", "packed.partial/triplets.json", "packed"]) == 1
    assert "would write packed.partial, which contains packed.partial/triplets.json" in capsys.readouterr().err
    assert tree(Path()) == before


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("command", ["infer", "evaluate"])
def test_pipes_sockets_and_devices_are_not_replaced(folder, command, kind, capsys):
    Path("out").mkdir()
    target = Path("out", COMMANDS[command][2])
    match kind:
        case "pipe":
            os.mkfifo(target)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(target))
        case "device":
            target.symlink_to(os.devnull)
    assert f"{target} is a device, pipe or socket; expected a file or no file" in refused(command, "out", capsys)


def test_a_pipe_in_the_place_of_the_records_is_not_read(folder, capsys):
    Path("out").mkdir()
    os.mkfifo("out/records.json")
    assert "out/records.json is a device, pipe or socket" in refused("infer", "out", capsys)
