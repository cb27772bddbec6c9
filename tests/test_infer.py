"""The command line of `python -m ra_jax.infer`, around a pipeline that only records how it is called."""

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
    monkeypatch.setattr(infer, "find_checkpoint", lambda where: where)
    monkeypatch.setattr(infer, "read_about", lambda checkpoint: SimpleNamespace(config=trained))
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
    assert "unreadable picture" in caught.value.code
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
