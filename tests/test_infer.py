"""The command line of `python -m ra_jax.infer`, with a pipeline that only records its calls."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ra_jax import infer, pipeline
from ra_jax.data.records import load_records


class RecordingPipeline:
    """A stand-in for `RemovalPipeline` that returns the photo as the removal."""

    loaded, calls = None, []

    @classmethod
    def from_pretrained(cls, fill, redux=None, experts=None, dtype="bfloat16"):
        cls.loaded, cls.calls = (fill, redux, experts, dtype), []
        return cls()

    def __call__(self, image, mask, ref=None, **settings):
        self.calls.append(settings | {"mask": int(np.asarray(mask).max()), "ref": ref})
        return SimpleNamespace(images=[image])


@dataclass(frozen=True)
class Scene:
    """A folder with photo.png and mask.png, and the flags of infer for them, with the output folder out/."""

    folder: Path
    flags: list[str]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "RemovalPipeline", RecordingPipeline)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "photo.png")
    Image.new("L", (20, 10), 200).save(tmp_path / "mask.png")
    names = {"source_image": "photo.png", "source_mask": "mask.png", "output_dir": "out"}
    return Scene(tmp_path, [f"--{flag}={tmp_path / name}" for flag, name in names.items()])


def test_candidates_have_consecutive_seeds(scene):
    folder, flags = scene.folder, scene.flags
    infer.main([*flags, "--seed", "5", "--repeat", "2", "--num_inference_steps", "4"])
    assert [call["seed"] for call in RecordingPipeline.calls] == [5, 6]
    assert all(call["num_inference_steps"] == 4 and call["mask"] == 200 for call in RecordingPipeline.calls)
    assert [record.id for record in load_records(folder / "out/records.json")] == ["photo_5", "photo_6"]


def test_candidates_may_be_written_beside_the_photo(scene):
    folder, flags = scene.folder, scene.flags
    before = {name: (folder / name).read_bytes() for name in ("photo.png", "mask.png")}
    for overwrite in ([], ["--overwrite"]):
        infer.main([*flags[:2], f"--output_dir={folder}", *overwrite])
    assert {path.name for path in folder.iterdir()} == {*before, "photo_0.png", "records.json"}
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_the_default_models_are_on_the_hub(scene):
    infer.main(scene.flags)
    fill, redux = "black-forest-labs/FLUX.1-Fill-dev", "black-forest-labs/FLUX.1-Redux-dev"
    assert RecordingPipeline.loaded == (fill, redux, None, "bfloat16")
    assert RecordingPipeline.calls[0]["guidance_scale"] == 30.0


def test_flags_default_to_the_settings_that_the_experts_were_trained_with(scene, monkeypatch):
    trained = {
        "pretrained_model_name_or_path": "tiny",
        "pretrained_redux_model_name_or_path": "tiny-redux",
        "mixed_precision": "no",
        "guidance_scale": 3.0,
        "gradient_checkpointing": "none",
        "max_sequence_length": 16,
        "seed": 9,
    }
    monkeypatch.setattr(infer, "find_checkpoint", Path)
    monkeypatch.setattr(infer, "read_metadata", lambda checkpoint: SimpleNamespace(config=trained))
    infer.main([*scene.flags, "--experts", "run", "--pretrained_redux_model_name_or_path", "other"])
    assert RecordingPipeline.loaded == ("tiny", "other", "run", "float32")
    assert RecordingPipeline.calls[0]["guidance_scale"] == 3.0
    assert RecordingPipeline.calls[0]["seed"] == 0


def test_errors_are_reported_before_the_model_is_loaded(scene):
    folder, flags = scene.folder, scene.flags
    RecordingPipeline.loaded = None
    (folder / "photo.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as caught:
        infer.main(flags)
    assert "unreadable image" in caught.value.code
    with pytest.raises(SystemExit) as caught:
        infer.main([*flags, "--repeat", "0"])
    assert "repeat = 0: expected a value at least 1" in caught.value.code
    with pytest.raises(SystemExit) as caught:
        infer.main([*flags, "--experts", str(folder)])
    assert RecordingPipeline.loaded is None


def test_a_missing_checkpoint_is_refused(scene):
    folder, flags = scene.folder, scene.flags
    with pytest.raises(SystemExit) as caught:
        infer.main([*flags, "--experts", str(folder / "none")])
    assert "no checkpoint in" in caught.value.code


@pytest.fixture
def working_folder(tmp_path, monkeypatch, make_checkpoint_files):
    """The working folder: photos/ and masks/ with a.png and b.png, run/ with a checkpoint, and two model folders."""
    monkeypatch.setattr(pipeline, "RemovalPipeline", RecordingPipeline)
    monkeypatch.chdir(tmp_path)
    for folder, mode in {"photos": "RGB", "masks": "L"}.items():
        Path(folder).mkdir()
        for name in ("a", "b"):
            Image.new(mode, (20, 10), "white").save(f"{folder}/{name}.png")
    make_checkpoint_files(Path("run/checkpoints/4"))
    for folder in ("run/best", "tiny", "tiny_redux"):
        Path(folder).mkdir()
    models = {"pretrained_model_name_or_path": "tiny", "pretrained_redux_model_name_or_path": "tiny_redux"}
    monkeypatch.setattr(infer, "read_metadata", lambda checkpoint: SimpleNamespace(config=models))
    RecordingPipeline.loaded = None
    return tmp_path


def run_infer(output_dir, *flags, source="photos", mask="masks"):
    infer.main([f"--source_image={source}", f"--source_mask={mask}", f"--output_dir={output_dir}", *flags])


def fail_to_infer(output_dir, *flags, **sources):
    """Run infer, which must refuse its flags and change no file, and return the message."""
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    with pytest.raises(SystemExit) as caught:
        run_infer(output_dir, *flags, **sources)
    assert RecordingPipeline.loaded is None
    assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == before
    return caught.value.code


@pytest.mark.parametrize("source", ["photos", "photos/a.png"])
def test_a_photo_is_not_overwritten_in_a_folder_with_the_subfolders_of_a_data_set(working_folder, source):
    """With --source_mask, the images in the folder itself are read, not those in its subfolder input/."""
    for subfolder in ("input", "mask"):
        Path("photos", subfolder).mkdir()
    Path("out").mkdir()
    Path("out/a_0.png").hardlink_to("photos/a.png")
    mask = "masks" if source == "photos" else "masks/a.png"
    message = fail_to_infer("out", "--overwrite", source=source, mask=mask)
    assert "out/a_0.png, which is the same file as photos/a.png, an input of --source_image (by a hard link)" in message


def test_a_photo_of_a_data_set_is_not_overwritten(working_folder):
    Path("set.json").write_text('[{"src": "photos/a.png", "mask": "masks/a.png"}]')
    Path("photos/a.png").rename("photos/a_0.png")
    Path("photos/a.png").symlink_to("a_0.png")
    with pytest.raises(SystemExit) as caught:
        infer.main(["--source_image=set.json", "--output_dir=photos", "--overwrite"])
    assert "would write photos/a_0.png, which is the same file as photos/a.png, an input" in caught.value.code


def test_subfolders_of_the_folder_of_photos_are_ignored(working_folder):
    """One is named like a folder of a data set, the other is a link to the output folder."""
    Path("photos/input").mkdir()
    Path("results").mkdir()
    Path("photos/results").symlink_to("../results")
    run_infer("results")
    assert {path.name for path in Path("results").iterdir()} == {"a_0.png", "b_0.png", "records.json"}


def test_images_are_recognized_by_their_content(working_folder):
    for kind in ("photo", "mask"):
        Image.open(f"{kind}s/a.png").save(kind, "GIF")
    run_infer("out", source="photo", mask="mask")
    assert Path("out/photo_0.png").exists()


def test_models_may_be_inside_the_output_folder(working_folder):
    run_infer(".", "--experts=run", source="photos/a.png", mask="masks/a.png")
    assert RecordingPipeline.loaded[:2] == ("tiny", "tiny_redux") and Path("a_0.png").exists()


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "pretrained_redux_model_name_or_path"])
def test_the_output_folder_must_not_be_in_a_model_folder(working_folder, flag):
    for output in ("tiny", "tiny/new"):
        assert f"an input of --{flag}" in fail_to_infer(output, f"--{flag}=tiny")


@pytest.mark.parametrize("experts", ["run", "run/checkpoints", "run/checkpoints/4"])
@pytest.mark.parametrize("output", ["run/checkpoints", "run/checkpoints/4", "run/checkpoints/new", "run/best"])
def test_the_output_folder_must_not_be_a_folder_of_checkpoints(working_folder, experts, output):
    assert f"would write into {output}, which" in fail_to_infer(output, f"--experts={experts}")


def test_the_output_folder_must_not_be_a_linked_folder_of_checkpoints(working_folder):
    Path("run/checkpoints").rename("large_disk")
    Path("run/checkpoints").symlink_to("../large_disk")
    for output in ("run/checkpoints", "large_disk"):
        assert f"would write into {output}, which" in fail_to_infer(output, "--experts=run")


def test_the_output_folder_may_be_in_the_folder_of_a_run(working_folder):
    run_infer("run/removals", "--experts=run")
    assert Path("run/removals/records.json").exists()
