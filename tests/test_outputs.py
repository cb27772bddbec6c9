"""Checks of outputs against inputs, by every kind of path, and the atomic replacement of files and folders."""

import errno
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
    explain_full_disk,
    replace_file,
    replace_folder,
    staging_folder,
    write_file,
)


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """The working folder: photos/ with a.png and b.png, and other/."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "other"):
        Path(folder).mkdir()
    for name in ("a.png", "b.png"):
        Path("photos", name).write_text(name)
    return tmp_path


def fail_to_check(outputs, inputs, **options):
    """Check outputs that must be refused, and return the message."""
    with pytest.raises(OutputError) as caught:
        check_outputs(outputs, inputs, **options)
    return str(caught.value)


def make_outputs(*files, folder=None, owned=()):
    return Outputs(
        "--output_dir", folder and Path(folder), [Path(file) for file in files], [Path(path) for path in owned]
    )


def make_inputs(*paths):
    return {"--source_image": [Path(path) for path in paths]}


ADVICE = "inputs are never replaced or deleted: choose another --output_dir that does not overlap the inputs"


class TestFiles:
    def test_an_input_file_is_refused(self, working_folder):
        message = fail_to_check(make_outputs("photos/a.png"), make_inputs("photos/a.png"))
        assert message == f"--output_dir: would write photos/a.png, which is an input of --source_image; {ADVICE}"

    @pytest.mark.parametrize("spelling", ["photos/../photos/a.png", "other/../photos/a.png", "./other/../photos/a.png"])
    def test_an_input_file_is_recognized_in_another_spelling(self, working_folder, spelling):
        expected = "which is the same file as photos/a.png, an input of --source_image;"
        assert expected in fail_to_check(make_outputs("new.png", spelling), make_inputs("photos/a.png"))
        assert expected in fail_to_check(make_outputs(working_folder / spelling), make_inputs("photos/a.png"))

    def test_an_input_file_is_recognized_through_a_link(self, working_folder):
        Path("other/x.png").symlink_to(working_folder / "photos/a.png")
        message = fail_to_check(make_outputs("other/x.png"), make_inputs("photos/a.png"))
        assert (
            "other/x.png, which is the same file as photos/a.png, an input of --source_image (through a link)"
            in message
        )
        assert "(through a link)" in fail_to_check(make_outputs("photos/a.png"), make_inputs("other/x.png"))

    def test_an_input_file_is_recognized_through_a_link_to_its_folder(self, working_folder):
        Path("link").symlink_to("photos")
        assert (
            "link/a.png, which is the same file as photos/a.png, an input of --source_image (through a link)"
            in fail_to_check(make_outputs("link/a.png"), make_inputs("photos/a.png"))
        )

    def test_an_input_file_is_recognized_through_a_hard_link(self, working_folder):
        os.link("photos/a.png", "other/x.png")
        message = fail_to_check(make_outputs("other/x.png"), make_inputs("photos/a.png"))
        assert "which is the same file as photos/a.png, an input of --source_image (by a hard link)" in message

    def test_a_file_inside_an_input_folder_is_refused(self, working_folder):
        assert "photos/new.json, which is inside photos, an input of" in fail_to_check(
            make_outputs("photos/new.json"), make_inputs("photos")
        )

    def test_a_file_beside_an_input_file_is_allowed(self, working_folder):
        check_outputs(
            make_outputs("photos/a_0.png", "photos/records.json", folder="photos"), make_inputs("photos/a.png")
        )

    def test_the_message_names_the_flag_of_the_input(self, working_folder):
        inputs = {"--source_image": [Path("photos/a.png")], "--source_mask": [Path("photos/b.png")]}
        assert "an input of --source_mask" in fail_to_check(make_outputs("photos/b.png"), inputs)

    def test_an_output_file_that_is_a_folder_is_refused(self, working_folder):
        assert "other is a folder; expected a file or no file" in fail_to_check(make_outputs("other"), {})

    @pytest.mark.parametrize("stops_at", ["open", "utime"])
    def test_the_check_for_a_writable_folder_changes_nothing(self, working_folder, monkeypatch, stops_at):
        before = Path().stat().st_mtime_ns
        os.utime("other", ns=(5, 7))
        check_outputs(make_outputs("other/new/a.png", "a.png", folder="other/new"), {})
        assert os.stat("other").st_mtime_ns == 7 and os.listdir("other") == []
        assert Path().stat().st_mtime_ns == before and sorted(os.listdir()) == ["other", "photos"]

        def refuse(*arguments, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path if stops_at == "open" else os, stops_at, refuse)
        if stops_at == "open":
            assert "no file can be created in other (Permission denied)" in fail_to_check(
                make_outputs(folder="other/new"), {}
            )
        else:  # only the owner of a folder may set its times
            check_outputs(make_outputs(folder="other/new"), {})
        assert os.listdir("other") == []

    def test_a_path_that_cannot_be_checked_is_refused(self, working_folder):
        message = fail_to_check(make_outputs("a.png"), make_inputs("x" * 300))
        assert message.startswith("--output_dir: the path cannot be checked (") and "File name too long" in message


class TestFolders:
    def test_an_input_folder_is_refused(self, working_folder):
        message = fail_to_check(make_outputs(folder="photos"), make_inputs("photos"))
        assert message == f"--output_dir: would write into photos, which is an input of --source_image; {ADVICE}"

    @pytest.mark.parametrize("spelling", ["photos/", "./photos", "other/../photos", "photos/../photos/."])
    def test_an_input_folder_is_recognized_in_another_spelling(self, working_folder, spelling):
        assert "an input of --source_image;" in fail_to_check(
            make_outputs(folder=spelling), make_inputs(working_folder / "photos")
        )

    def test_an_input_folder_is_recognized_through_links(self, working_folder):
        Path("link").symlink_to("photos")
        Path("around").symlink_to(working_folder)
        for output in ("link", "around/photos"):
            assert (
                f"{output}, which is the same folder as photos, an input of --source_image (through a link)"
                in fail_to_check(make_outputs(folder=output), make_inputs("photos"))
            )
        assert "an input of --source_image (through a link)" in fail_to_check(
            make_outputs(folder="photos"), make_inputs("link")
        )
        assert "link/new/out, which is inside photos" in fail_to_check(
            make_outputs(folder="link/new/out"), make_inputs("photos")
        )

    def test_a_folder_inside_an_input_folder_is_refused(self, working_folder):
        message = fail_to_check(make_outputs(folder="photos/new/out"), make_inputs("photos"))
        assert "photos/new/out, which is inside photos, an input of --source_image;" in message

    def test_a_folder_that_contains_an_input_folder_is_refused(self, working_folder):
        assert "., which contains photos, an input of --source_image;" in fail_to_check(
            make_outputs(folder="."), make_inputs("photos")
        )

    def test_a_folder_that_contains_a_link_to_an_input_folder_is_refused(self, working_folder):
        Path("other/link").symlink_to(working_folder / "photos")
        assert "other, which contains other/link" in fail_to_check(
            make_outputs(folder="other"), make_inputs("other/link")
        )

    def test_a_folder_that_contains_an_input_file_is_allowed(self, working_folder):
        check_outputs(make_outputs(folder="."), make_inputs("photos/a.png"))

    def test_folders_whose_names_start_alike_do_not_overlap(self, working_folder):
        check_outputs(make_outputs(folder="photos_2"), make_inputs("photos"))
        check_outputs(
            make_outputs("other/a.png", folder="other", owned=["other/previews"]), make_inputs("photos", "photos/a.png")
        )

    def test_a_folder_before_two_dots_in_an_input_path_does_not_contain_the_input(self, working_folder):
        check_outputs(make_outputs(folder="other", owned=["other"]), make_inputs("other/../photos"))

    def test_an_input_folder_is_recognized_by_its_inode(self, working_folder, monkeypatch):
        """On a file system that ignores case, or under a bind mount, even the resolved paths of a folder differ."""
        photos_stat = Path("photos").stat()
        original_stat = Path.stat

        def stat_of_mount(path, **options):
            return photos_stat if path.name == "PHOTOS" else original_stat(path, **options)

        monkeypatch.setattr(Path, "stat", stat_of_mount)
        assert "an input of --source_image (under another name)" in fail_to_check(
            make_outputs(folder="PHOTOS"), make_inputs("photos")
        )
        assert "PHOTOS/new, which is inside photos" in fail_to_check(
            make_outputs(folder="PHOTOS/new"), make_inputs("photos")
        )

    def test_an_output_folder_that_is_a_file_is_refused(self, working_folder):
        for folder in ("photos/a.png", "photos/a.png/out"):
            assert "photos/a.png: is a file; expected a folder" in fail_to_check(make_outputs(folder=folder), {})

    def test_an_input_that_does_not_exist_is_ignored(self, working_folder):
        check_outputs(make_outputs(folder="owner/model"), make_inputs("owner/model"))


class TestOwnedFolders:
    def test_must_not_contain_an_input(self, working_folder):
        for path in ("photos", "photos/a.png"):
            assert f"photos, which {'is' if path == 'photos' else f'contains {path},'} an input of" in fail_to_check(
                make_outputs(owned=["photos"]), make_inputs(path)
            )

    def test_must_not_contain_a_link_to_an_input(self, working_folder):
        Path("other/previews").mkdir()
        Path("other/previews/a.png").symlink_to(working_folder / "photos/a.png")
        Path("other/previews/all").symlink_to(working_folder / "photos")
        for path in ("other/previews/a.png", "other/previews/all/a.png"):
            assert "other/previews, which contains" in fail_to_check(
                make_outputs(owned=["other/previews"]), make_inputs(path)
            )

    def test_must_not_be_a_file_or_a_broken_link(self, working_folder):
        """For example, checkpoints/ of a run may be a link to a disk that is not mounted."""
        Path("other/checkpoints").symlink_to("/nowhere/checkpoints")
        Path("other/previews").write_text("mine")
        run = make_outputs(folder="other", owned=["other/checkpoints"])
        assert "other/checkpoints: is a broken symbolic link; expected a folder" in fail_to_check(run, {})
        assert "other/previews: is a file; expected a folder" in fail_to_check(
            make_outputs(owned=["other/previews"]), {}
        )

    def test_must_not_be_inside_an_input(self, working_folder):
        assert "photos/previews, which is inside photos" in fail_to_check(
            make_outputs(owned=["photos/previews"]), make_inputs("photos")
        )


class TestCheckpoints:
    @pytest.fixture
    def checkpoint_inputs(self, working_folder):
        """A checkpoint as an input that may be inside the output folder."""
        path = Path("run/checkpoints/4")
        path.mkdir(parents=True)
        return {"--experts": [path]}

    @pytest.mark.parametrize("folder", ["run", "run/removals", ".", "new"])
    def test_may_be_inside_the_output_folder(self, checkpoint_inputs, folder):
        check_outputs(make_outputs(f"{folder}/records.json", folder=folder), {}, nested=checkpoint_inputs)

    @pytest.mark.parametrize("folder", ["run/checkpoints/4", "run/checkpoints/4/state/out"])
    def test_must_not_contain_the_output(self, checkpoint_inputs, folder):
        assert "an input of --experts" in fail_to_check(make_outputs(folder=folder), {}, nested=checkpoint_inputs)

    def test_must_not_be_inside_a_folder_that_is_replaced(self, checkpoint_inputs):
        run = make_outputs(folder="run", owned=["run/checkpoints", "run/previews"])
        assert "would write run/checkpoints, which contains run/checkpoints/4, an input of --experts" in fail_to_check(
            run, {}, nested=checkpoint_inputs
        )


class TestReplacedFile:
    def test_has_the_new_content_and_no_draft_remains(self, working_folder):
        write_file(Path("other/x.txt"), "größer\n")
        assert Path("other/x.txt").read_bytes() == "größer\n".encode()
        write_file(Path("other/x.txt"), b"\x00")
        assert Path("other/x.txt").read_bytes() == b"\x00"
        assert os.listdir("other") == ["x.txt"]

    def test_keeps_the_old_content_until_the_new_one_is_complete(self, working_folder):
        with replace_file(Path("photos/a.png")) as draft:
            draft.write_text("half")
            assert draft.parent == Path("photos") and draft.suffix == ".tmp"
            assert Path("photos/a.png").read_text() == "a.png"
        assert Path("photos/a.png").read_text() == "half"

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_stays_unchanged_if_writing_fails(self, working_folder, error):
        with pytest.raises(error), replace_file(Path("photos/a.png")) as draft:
            draft.write_text("half")
            raise error
        assert sorted(os.listdir("photos")) == ["a.png", "b.png"]
        assert Path("photos/a.png").read_text() == "a.png"

    def test_drafts_do_not_use_names_of_existing_files(self, working_folder):
        for name in ("a.png.tmp", "a.tmp"):
            Path("photos", name).write_text("mine")
        write_file(Path("photos/a.png"), "new")
        assert Path("photos/a.png.tmp").read_text() == Path("photos/a.tmp").read_text() == "mine"

    def test_a_link_is_replaced_and_its_target_stays(self, working_folder):
        Path("other/soft").symlink_to(working_folder / "photos/a.png")
        os.link("photos/b.png", "other/hard")
        for name in ("soft", "hard"):
            write_file(Path("other", name), "new")
            assert Path("other", name).read_text() == "new" and not Path("other", name).is_symlink()
        assert Path("photos/a.png").read_text() == "a.png" and Path("photos/b.png").read_text() == "b.png"

    def test_permissions_are_the_default_or_those_of_the_old_file(self, working_folder):
        def get_mode(path):
            return stat.S_IMODE(Path(path).stat().st_mode)

        old_umask = os.umask(0o027)
        try:
            write_file(Path("new.txt"), "")
            with replace_file(Path("other.txt")) as draft:
                draft.unlink()  # some libraries delete the draft and write a new file
                os.close(os.open(draft, os.O_CREAT | os.O_WRONLY, 0o600))
        finally:
            os.umask(old_umask)
        assert get_mode("new.txt") == get_mode("other.txt") == 0o640
        Path("photos/a.png").chmod(0o604)
        write_file(Path("photos/a.png"), "")
        assert get_mode("photos/a.png") == 0o604

    def test_may_have_a_name_of_the_longest_allowed_length(self, working_folder):
        name = "ä" * 125 + ".png"  # 254 bytes; at most 255 are allowed
        write_file(Path(name), "new")
        assert Path(name).read_text() == "new"


class TestReplacedFolder:
    def test_appears_when_it_is_complete(self, working_folder):
        with replace_folder(working_folder / "new") as staging:
            (staging / "file").write_text("x")
            assert not Path("new").exists()
        assert os.listdir("new") == ["file"] and not staging.exists()

    def test_replaces_an_earlier_one(self, working_folder):
        with replace_folder(working_folder / "photos") as staging:
            (staging / "c.png").write_text("c")
            assert sorted(os.listdir("photos")) == ["a.png", "b.png"]
        assert os.listdir("photos") == ["c.png"]
        assert sorted(os.listdir()) == ["other", "photos"]

    def test_stays_unchanged_if_writing_fails(self, working_folder):
        with pytest.raises(KeyboardInterrupt), replace_folder(working_folder / "photos"):
            raise KeyboardInterrupt
        assert sorted(os.listdir()) == ["other", "photos"]
        assert sorted(os.listdir("photos")) == ["a.png", "b.png"]

    def test_the_unfinished_folder_of_a_killed_run_is_deleted(self, working_folder):
        staging = staging_folder(working_folder / "new")
        staging.mkdir()
        (staging / UNFINISHED).write_text(UNFINISHED_NOTE)
        (staging / "half").touch()
        with replace_folder(working_folder / "new") as staging:
            (staging / "file").write_text("x")
        assert os.listdir("new") == ["file"]

    def test_is_restored_if_the_draft_cannot_be_renamed(self, working_folder, monkeypatch):
        rename = Path.rename

        def fail_for_drafts(path, target):
            if path.name == "photos.partial":
                raise OSError("no space")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail_for_drafts)
        with pytest.raises(OSError, match="no space"), replace_folder(working_folder / "photos"):
            pass
        assert sorted(os.listdir()) == ["other", "photos"]
        assert sorted(os.listdir("photos")) == ["a.png", "b.png"]

    def test_no_draft_remains_if_the_old_folder_cannot_be_renamed(self, working_folder, monkeypatch):
        def fail(path, target):
            raise OSError("busy")

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="busy"), replace_folder(working_folder / "photos"):
            pass
        assert sorted(os.listdir()) == ["other", "photos"]
        assert sorted(os.listdir("photos")) == ["a.png", "b.png"]

    def test_a_mount_point_is_refused_before_anything_is_written(self, working_folder, monkeypatch):
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "other")
        with pytest.raises(OutputError, match="other: is a mount point, which cannot be replaced"):
            replace_folder(working_folder / "other").__enter__()
        assert sorted(os.listdir()) == ["other", "photos"]

    @pytest.mark.parametrize("kind", ["folder", "folder with a note", "file", "link", "dangling link"])
    def test_a_staging_folder_that_no_run_wrote_stays(self, working_folder, kind):
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
        for check in (check_staging, lambda folder: replace_folder(folder).__enter__()):
            with pytest.raises(OutputError, match=r"new\.partial: .* is not the unfinished folder of a stopped run"):
                check(Path("new"))
        assert staging.lstat() == before


class TestFullDisk:
    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
            ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code='28']"),
        ],
    )
    def test_is_explained(self, error):
        message = r"run: the disk is full, .*; make room, then continue with --resume_from_checkpoint latest"
        with pytest.raises(OutputError, match=message), explain_full_disk(Path("run")):
            raise error

    @pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), ValueError("bad value"), OutputError("x")])
    def test_other_errors_stay(self, error):
        with pytest.raises(type(error)) as raised, explain_full_disk(Path("run")):
            raise error
        assert raised.value is error
