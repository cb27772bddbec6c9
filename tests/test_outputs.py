"""Checks of outputs against inputs, by every kind of path, and the atomic replacement of files and folders."""

import os
import stat
from pathlib import Path

import pytest

from ra_jax.errors import OutputError
from ra_jax.outputs import (
    UNFINISHED,
    UNFINISHED_NOTE,
    Outputs,
    check_outputs,
    check_staging,
    replace_file,
    replace_folder,
    staging_folder,
    write_file,
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder: photos/ with a.png and b.png, and other/."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "other"):
        Path(folder).mkdir()
    for name in ("a.png", "b.png"):
        Path("photos", name).write_text(name)
    return tmp_path


def refusal(outputs, inputs, **more):
    with pytest.raises(OutputError) as caught:
        check_outputs(outputs, inputs, **more)
    return str(caught.value)


def outputs(*files, folder=None, owned=()):
    return Outputs("--output_dir", folder and Path(folder), [Path(file) for file in files], [Path(o) for o in owned])


def read(*paths):
    return {"--source_image": [Path(path) for path in paths]}


ADVICE = "inputs are never replaced or deleted: choose another --output_dir that does not overlap the inputs"


class TestFiles:
    def test_the_same_file(self, place):
        message = refusal(outputs("photos/a.png"), read("photos/a.png"))
        assert message == f"--output_dir: would write photos/a.png, which is an input of --source_image; {ADVICE}"

    @pytest.mark.parametrize("spelling", ["photos/../photos/a.png", "other/../photos/a.png", "./other/../photos/a.png"])
    def test_another_spelling(self, place, spelling):
        expected = "which is the same file as photos/a.png, an input of --source_image;"
        assert expected in refusal(outputs("new.png", spelling), read("photos/a.png"))
        assert expected in refusal(outputs(place / spelling), read("photos/a.png"))

    def test_a_link_to_the_file(self, place):
        Path("other/x.png").symlink_to(place / "photos/a.png")
        message = refusal(outputs("other/x.png"), read("photos/a.png"))
        assert (
            "other/x.png, which is the same file as photos/a.png, an input of --source_image (through a link)"
            in message
        )
        assert "(through a link)" in refusal(outputs("photos/a.png"), read("other/x.png"))

    def test_a_link_to_its_parent_folder(self, place):
        Path("link").symlink_to("photos")
        assert (
            "link/a.png, which is the same file as photos/a.png, an input of --source_image (through a link)"
            in refusal(outputs("link/a.png"), read("photos/a.png"))
        )

    def test_a_hard_link(self, place):
        os.link("photos/a.png", "other/x.png")
        message = refusal(outputs("other/x.png"), read("photos/a.png"))
        assert "which is the same file as photos/a.png, an input of --source_image (by a hard link)" in message

    def test_a_file_in_an_input_folder(self, place):
        assert "photos/new.json, which is inside photos, an input of" in refusal(
            outputs("photos/new.json"), read("photos")
        )

    def test_a_file_beside_an_input_file(self, place):
        check_outputs(outputs("photos/a_0.png", "photos/records.json", folder="photos"), read("photos/a.png"))

    def test_the_flag_of_the_input_is_named(self, place):
        inputs = {"--source_image": [Path("photos/a.png")], "--source_mask": [Path("photos/b.png")]}
        assert "an input of --source_mask" in refusal(outputs("photos/b.png"), inputs)

    def test_a_folder_in_the_place_of_an_output_file(self, place):
        assert "other is a folder; expected a file or no file" in refusal(outputs("other"), {})

    @pytest.mark.parametrize("stops_at", ["open", "utime"])
    def test_the_test_for_a_writable_folder_changes_nothing(self, place, monkeypatch, stops_at):
        before = Path().stat().st_mtime_ns
        os.utime("other", ns=(5, 7))
        check_outputs(outputs("other/new/a.png", "a.png", folder="other/new"), {})
        assert os.stat("other").st_mtime_ns == 7 and os.listdir("other") == []
        assert Path().stat().st_mtime_ns == before and sorted(os.listdir()) == ["other", "photos"]

        def refuses(*arguments, **more):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path if stops_at == "open" else os, stops_at, refuses)
        if stops_at == "open":
            assert "no file can be created in other (Permission denied)" in refusal(outputs(folder="other/new"), {})
        else:  # a writable folder of another user
            check_outputs(outputs(folder="other/new"), {})
        assert os.listdir("other") == []

    def test_a_path_that_cannot_be_checked(self, place):
        message = refusal(outputs("a.png"), read("x" * 300))
        assert message.startswith("--output_dir: the path cannot be checked (") and "File name too long" in message


class TestFolders:
    def test_the_same_folder(self, place):
        message = refusal(outputs(folder="photos"), read("photos"))
        assert message == f"--output_dir: would write into photos, which is an input of --source_image; {ADVICE}"

    @pytest.mark.parametrize("spelling", ["photos/", "./photos", "other/../photos", "photos/../photos/."])
    def test_another_spelling(self, place, spelling):
        assert "an input of --source_image;" in refusal(outputs(folder=spelling), read(place / "photos"))

    def test_links(self, place):
        Path("link").symlink_to("photos")
        Path("around").symlink_to(place)
        for output in ("link", "around/photos"):
            assert (
                f"{output}, which is the same folder as photos, an input of --source_image (through a link)"
                in refusal(outputs(folder=output), read("photos"))
            )
        assert "an input of --source_image (through a link)" in refusal(outputs(folder="photos"), read("link"))
        assert "link/new/out, which is inside photos" in refusal(outputs(folder="link/new/out"), read("photos"))

    def test_inside(self, place):
        message = refusal(outputs(folder="photos/new/out"), read("photos"))
        assert "photos/new/out, which is inside photos, an input of --source_image;" in message

    def test_a_parent_folder(self, place):
        assert "., which contains photos, an input of --source_image;" in refusal(outputs(folder="."), read("photos"))

    def test_the_parent_folder_of_a_link(self, place):
        Path("other/link").symlink_to(place / "photos")
        assert "other, which contains other/link" in refusal(outputs(folder="other"), read("other/link"))

    def test_the_parent_folder_of_an_input_file_is_allowed(self, place):
        check_outputs(outputs(folder="."), read("photos/a.png"))

    def test_folders_whose_names_start_alike_do_not_overlap(self, place):
        check_outputs(outputs(folder="photos_2"), read("photos"))
        check_outputs(outputs("other/a.png", folder="other", owned=["other/previews"]), read("photos", "photos/a.png"))

    def test_a_folder_that_only_the_spelling_passes_through_is_no_parent(self, place):
        check_outputs(outputs(folder="other", owned=["other"]), read("other/../photos"))

    def test_the_same_folder_by_its_inode_alone(self, place, monkeypatch):
        """On a file system that ignores case, or under a bind mount, even the resolved paths of a folder differ."""
        inode = Path("photos").stat()
        stat_of = Path.stat

        def mounted(path, **options):
            return inode if path.name == "PHOTOS" else stat_of(path, **options)

        monkeypatch.setattr(Path, "stat", mounted)
        assert "an input of --source_image (under another name)" in refusal(outputs(folder="PHOTOS"), read("photos"))
        assert "PHOTOS/new, which is inside photos" in refusal(outputs(folder="PHOTOS/new"), read("photos"))

    def test_a_file_in_the_place_of_the_folder(self, place):
        for folder in ("photos/a.png", "photos/a.png/out"):
            assert "photos/a.png: is a file; expected a folder" in refusal(outputs(folder=folder), {})

    def test_an_input_that_does_not_exist_is_ignored(self, place):
        check_outputs(outputs(folder="owner/model"), read("owner/model"))


class TestOwnedFolders:
    def test_must_not_contain_an_input(self, place):
        for path in ("photos", "photos/a.png"):
            assert f"photos, which {'is' if path == 'photos' else f'contains {path},'} an input of" in refusal(
                outputs(owned=["photos"]), read(path)
            )

    def test_must_not_contain_a_link_to_an_input(self, place):
        Path("other/previews").mkdir()
        Path("other/previews/a.png").symlink_to(place / "photos/a.png")
        Path("other/previews/all").symlink_to(place / "photos")
        for path in ("other/previews/a.png", "other/previews/all/a.png"):
            assert "other/previews, which contains" in refusal(outputs(owned=["other/previews"]), read(path))

    def test_must_not_be_a_file_or_a_broken_link(self, place):
        """For example, checkpoints/ of a run may be a link to a disk that is not mounted."""
        Path("other/checkpoints").symlink_to("/nowhere/checkpoints")
        Path("other/previews").write_text("mine")
        run = outputs(folder="other", owned=["other/checkpoints"])
        assert "other/checkpoints: is a broken symbolic link; expected a folder" in refusal(run, {})
        assert "other/previews: is a file; expected a folder" in refusal(outputs(owned=["other/previews"]), {})

    def test_must_not_be_inside_an_input(self, place):
        assert "photos/previews, which is inside photos" in refusal(outputs(owned=["photos/previews"]), read("photos"))


class TestCheckpoints:
    @pytest.fixture
    def checkpoint(self, place):
        path = Path("run/checkpoints/4")
        path.mkdir(parents=True)
        return {"nested": {"--experts": [path]}}

    @pytest.mark.parametrize("folder", ["run", "run/removals", ".", "new"])
    def test_may_be_inside_the_output_folder(self, checkpoint, folder):
        check_outputs(outputs(f"{folder}/records.json", folder=folder), {}, **checkpoint)

    @pytest.mark.parametrize("folder", ["run/checkpoints/4", "run/checkpoints/4/state/out"])
    def test_must_not_contain_the_output(self, checkpoint, folder):
        assert "an input of --experts" in refusal(outputs(folder=folder), {}, **checkpoint)

    def test_must_not_be_inside_a_folder_that_is_replaced(self, checkpoint):
        run = outputs(folder="run", owned=["run/checkpoints", "run/previews"])
        assert "would write run/checkpoints, which contains run/checkpoints/4, an input of --experts" in refusal(
            run, {}, **checkpoint
        )


class TestReplacedFile:
    def test_has_the_new_content_and_no_draft_remains(self, place):
        write_file(Path("other/x.txt"), "größer\n")
        assert Path("other/x.txt").read_bytes() == "größer\n".encode()
        write_file(Path("other/x.txt"), b"\x00")
        assert Path("other/x.txt").read_bytes() == b"\x00"
        assert os.listdir("other") == ["x.txt"]

    def test_keeps_the_old_content_until_the_new_one_is_complete(self, place):
        with replace_file(Path("photos/a.png")) as draft:
            draft.write_text("half")
            assert draft.parent == Path("photos") and draft.suffix == ".tmp"
            assert Path("photos/a.png").read_text() == "a.png"
        assert Path("photos/a.png").read_text() == "half"

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_stays_unchanged_if_writing_fails(self, place, error):
        with pytest.raises(error), replace_file(Path("photos/a.png")) as draft:
            draft.write_text("half")
            raise error
        assert sorted(os.listdir("photos")) == ["a.png", "b.png"]
        assert Path("photos/a.png").read_text() == "a.png"

    def test_drafts_do_not_use_names_of_existing_files(self, place):
        for name in ("a.png.tmp", "a.tmp"):
            Path("photos", name).write_text("mine")
        write_file(Path("photos/a.png"), "new")
        assert Path("photos/a.png.tmp").read_text() == Path("photos/a.tmp").read_text() == "mine"

    def test_a_link_is_replaced_and_its_target_stays(self, place):
        Path("other/soft").symlink_to(place / "photos/a.png")
        os.link("photos/b.png", "other/hard")
        for name in ("soft", "hard"):
            write_file(Path("other", name), "new")
            assert Path("other", name).read_text() == "new" and not Path("other", name).is_symlink()
        assert Path("photos/a.png").read_text() == "a.png" and Path("photos/b.png").read_text() == "b.png"

    def test_permissions_are_the_default_or_those_of_the_old_file(self, place):
        def mode(path):
            return stat.S_IMODE(Path(path).stat().st_mode)

        before = os.umask(0o027)
        try:
            write_file(Path("new.txt"), "")
            with replace_file(Path("other.txt")) as draft:
                draft.unlink()  # as some libraries do, which write a new file
                os.close(os.open(draft, os.O_CREAT | os.O_WRONLY, 0o600))
        finally:
            os.umask(before)
        assert mode("new.txt") == mode("other.txt") == 0o640
        Path("photos/a.png").chmod(0o604)
        write_file(Path("photos/a.png"), "")
        assert mode("photos/a.png") == 0o604

    def test_a_name_of_the_longest_allowed_length(self, place):
        name = "ä" * 125 + ".png"  # 254 bytes; at most 255 are allowed
        write_file(Path(name), "new")
        assert Path(name).read_text() == "new"


class TestReplacedFolder:
    def test_appears_when_it_is_complete(self, place):
        with replace_folder(place / "new") as staging:
            (staging / "file").write_text("x")
            assert not Path("new").exists()
        assert os.listdir("new") == ["file"] and not staging.exists()

    def test_replaces_an_earlier_one(self, place):
        with replace_folder(place / "photos") as staging:
            (staging / "c.png").write_text("c")
            assert sorted(os.listdir("photos")) == ["a.png", "b.png"]
        assert os.listdir("photos") == ["c.png"]
        assert sorted(os.listdir()) == ["other", "photos"]

    def test_stays_unchanged_if_writing_fails(self, place):
        with pytest.raises(KeyboardInterrupt), replace_folder(place / "photos"):
            raise KeyboardInterrupt
        assert sorted(os.listdir()) == ["other", "photos"]
        assert sorted(os.listdir("photos")) == ["a.png", "b.png"]

    def test_the_unfinished_folder_of_a_killed_run_is_deleted(self, place):
        staging = staging_folder(place / "new")
        staging.mkdir()
        (staging / UNFINISHED).write_text(UNFINISHED_NOTE)
        (staging / "half").touch()
        with replace_folder(place / "new") as staging:
            (staging / "file").write_text("x")
        assert os.listdir("new") == ["file"]

    def test_is_restored_if_the_draft_cannot_be_renamed(self, place, monkeypatch):
        rename = Path.rename

        def fails_for_drafts(path, target):
            if path.name == "photos.partial":
                raise OSError("no space")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fails_for_drafts)
        with pytest.raises(OSError, match="no space"), replace_folder(place / "photos"):
            pass
        assert sorted(os.listdir()) == ["other", "photos"]
        assert sorted(os.listdir("photos")) == ["a.png", "b.png"]

    def test_no_draft_remains_if_the_old_folder_cannot_be_renamed(self, place, monkeypatch):
        def fails(path, target):
            raise OSError("busy")

        monkeypatch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="busy"), replace_folder(place / "photos"):
            pass
        assert sorted(os.listdir()) == ["other", "photos"]
        assert sorted(os.listdir("photos")) == ["a.png", "b.png"]

    def test_a_mount_point_is_refused_before_anything_is_written(self, place, monkeypatch):
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "other")
        with pytest.raises(OutputError, match="other: is a mount point, which cannot be replaced"):
            replace_folder(place / "other").__enter__()
        assert sorted(os.listdir()) == ["other", "photos"]

    @pytest.mark.parametrize("kind", ["folder", "folder with a note", "file", "link", "dangling link"])
    def test_a_staging_folder_that_no_run_wrote_stays(self, place, kind):
        staging = Path("new.partial")
        match kind:
            case "folder":
                Path("photos").rename(staging)
            case "folder with a note":
                Path("photos", UNFINISHED).write_text("my list of what is unfinished")
                Path("photos").rename(staging)
            case "file":
                staging.write_text("mine")
            case "link":
                Path("photos", UNFINISHED).write_text(UNFINISHED_NOTE)
                staging.symlink_to("photos")
            case "dangling link":
                staging.symlink_to("nowhere")
        before = staging.lstat()
        for refused in (check_staging, lambda folder: replace_folder(folder).__enter__()):
            with pytest.raises(OutputError, match=r"new\.partial: .* is not the unfinished folder of a stopped run"):
                refused(Path("new"))
        assert staging.lstat() == before
