"""The command line of `python -m ra_jax.infer`, around a pipeline that only records how it is called."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ra_jax import infer, pipeline
from ra_jax.data.records import load_records


class RecordingPipeline:
    loaded, calls = None, []

    @classmethod
    def from_pretrained(cls, fill, redux=None, experts=None, dtype="bfloat16"):
        cls.loaded, cls.calls = (fill, redux, experts, dtype), []
        return cls()

    def __call__(self, image, mask, ref=None, **settings):
        self.calls.append(settings | {"mask": int(np.asarray(mask).max()), "ref": ref})
        return SimpleNamespace(images=[image])


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "RemovalPipeline", RecordingPipeline)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "photo.png")
    Image.new("L", (20, 10), 200).save(tmp_path / "mask.png")
    names = {"source_image": "photo.png", "source_mask": "mask.png", "output_dir": "out"}
    return tmp_path, [f"--{flag}={tmp_path / name}" for flag, name in names.items()]


def test_candidates_with_consecutive_seeds(scene):
    folder, flags = scene
    infer.main([*flags, "--seed", "5", "--repeat", "2", "--num_inference_steps", "4"])
    assert [call["seed"] for call in RecordingPipeline.calls] == [5, 6]
    assert all(call["num_inference_steps"] == 4 and call["mask"] == 200 for call in RecordingPipeline.calls)
    assert [record.id for record in load_records(folder / "out/records.json")] == ["photo_5", "photo_6"]


def test_candidates_may_lie_beside_the_photo(scene):
    folder, flags = scene
    before = {name: (folder / name).read_bytes() for name in ("photo.png", "mask.png")}
    for more in ([], ["--overwrite"]):
        infer.main([*flags[:2], f"--output_dir={folder}", *more])
    assert {path.name for path in folder.iterdir()} == {*before, "photo_0.png", "records.json"}
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_the_model_defaults_to_the_hubs(scene):
    infer.main(scene[1])
    fill, redux = "black-forest-labs/FLUX.1-Fill-dev", "black-forest-labs/FLUX.1-Redux-dev"
    assert RecordingPipeline.loaded == (fill, redux, None, "bfloat16")
    assert RecordingPipeline.calls[0]["guidance_scale"] == 30.0


def test_what_is_not_given_is_as_the_experts_were_trained(scene, monkeypatch):
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
    infer.main([*scene[1], "--experts", "run", "--pretrained_redux_model_name_or_path", "other"])
    assert RecordingPipeline.loaded == ("tiny", "other", "run", "float32")
    assert RecordingPipeline.calls[0]["guidance_scale"] == 3.0
    assert RecordingPipeline.calls[0]["seed"] == 0


def test_faults_are_told_before_the_model_is_loaded(scene):
    folder, flags = scene
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


def test_a_checkpoint_that_is_not_there(scene):
    folder, flags = scene
    with pytest.raises(SystemExit) as caught:
        infer.main([*flags, "--experts", str(folder / "none")])
    assert "no checkpoint in" in caught.value.code


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Working folder: photos/ and masks/ with a.png and b.png each, a run with a checkpoint, two models' folders."""
    monkeypatch.setattr(pipeline, "RemovalPipeline", RecordingPipeline)
    monkeypatch.chdir(tmp_path)
    for folder, mode in {"photos": "RGB", "masks": "L"}.items():
        Path(folder).mkdir()
        for name in ("a", "b"):
            Image.new(mode, (20, 10), "white").save(f"{folder}/{name}.png")
    for part in ("state", "about"):
        Path("run/checkpoints/4", part).mkdir(parents=True)
    for folder in ("run/best", "tiny", "tiny_redux"):
        Path(folder).mkdir()
    models = {"pretrained_model_name_or_path": "tiny", "pretrained_redux_model_name_or_path": "tiny_redux"}
    monkeypatch.setattr(infer, "read_metadata", lambda checkpoint: SimpleNamespace(config=models))
    RecordingPipeline.loaded = None
    return tmp_path


def infer_photos(output_dir, *more, source="photos", mask="masks"):
    infer.main([f"--source_image={source}", f"--source_mask={mask}", f"--output_dir={output_dir}", *more])


def message_of_photos(output_dir, *more, **sources):
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    with pytest.raises(SystemExit) as caught:
        infer_photos(output_dir, *more, **sources)
    assert RecordingPipeline.loaded is None
    assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == before
    return caught.value.code


@pytest.mark.parametrize("source", ["photos", "photos/a.png"])
def test_a_photo_is_kept_in_a_folder_that_looks_like_a_data_set(photos, source):
    """With masks given, the pictures in the folder itself are read."""
    for room in ("input", "mask"):
        Path("photos", room).mkdir()
    Path("out").mkdir()
    Path("out/a_0.png").hardlink_to("photos/a.png")
    mask = "masks" if source == "photos" else "masks/a.png"
    message = message_of_photos("out", "--overwrite", source=source, mask=mask)
    assert "out/a_0.png, which is the same file as photos/a.png, an input of --source_image (by a hard link)" in message


def test_a_scene_of_a_data_set_is_kept(photos):
    Path("set.json").write_text('[{"src": "photos/a.png", "mask": "masks/a.png"}]')
    Path("photos/a.png").rename("photos/a_0.png")
    Path("photos/a.png").symlink_to("a_0.png")
    with pytest.raises(SystemExit) as caught:
        infer.main(["--source_image=set.json", "--output_dir=photos", "--overwrite"])
    assert "would write photos/a_0.png, which is the same file as photos/a.png, an input" in caught.value.code


def test_folders_among_the_photos_are_no_matter(photos):
    """Neither one that is named as a data set's is, nor a link to where results go."""
    Path("photos/input").mkdir()
    Path("results").mkdir()
    Path("photos/results").symlink_to("../results")
    infer_photos("results")
    assert {path.name for path in Path("results").iterdir()} == {"a_0.png", "b_0.png", "records.json"}


def test_pictures_are_known_by_their_content(photos):
    for kind in ("photo", "mask"):
        Image.open(f"{kind}s/a.png").save(kind, "GIF")
    infer_photos("out", source="photo", mask="mask")
    assert Path("out/photo_0.png").exists()


def test_the_models_may_lie_in_the_output_folder(photos):
    infer_photos(".", "--experts=run", source="photos/a.png", mask="masks/a.png")
    assert RecordingPipeline.loaded[:2] == ("tiny", "tiny_redux") and Path("a_0.png").exists()


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "pretrained_redux_model_name_or_path"])
def test_nothing_is_written_into_a_model(photos, flag):
    for output in ("tiny", "tiny/new"):
        assert f"an input of --{flag}" in message_of_photos(output, f"--{flag}=tiny")


@pytest.mark.parametrize("experts", ["run", "run/checkpoints", "run/checkpoints/4"])
@pytest.mark.parametrize("output", ["run/checkpoints", "run/checkpoints/4", "run/checkpoints/new", "run/best"])
def test_nothing_is_written_among_checkpoints(photos, experts, output):
    assert f"would write into {output}, which" in message_of_photos(output, f"--experts={experts}")


def test_nothing_is_written_among_checkpoints_that_lie_elsewhere(photos):
    Path("run/checkpoints").rename("large_disk")
    Path("run/checkpoints").symlink_to("../large_disk")
    for output in ("run/checkpoints", "large_disk"):
        assert f"would write into {output}, which" in message_of_photos(output, "--experts=run")


def test_results_go_into_the_runs_folder(photos):
    infer_photos("run/removals", "--experts=run")
    assert Path("run/removals/records.json").exists()
