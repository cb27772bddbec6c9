"""Weight files: new files replace old ones only when they are complete, and damaged files are refused."""

import json
import os
import shutil
import stat

import numpy as np
import pytest

from ra_jax.errors import WeightError
from ra_jax.interop import safetensors_io
from ra_jax.interop.safetensors_io import stored_tensors, write_tensors

STEM = "diffusion_pytorch_model"


def write_weights(folder, value, *, names=("a", "b"), stem=STEM):
    tensors = {name: np.full(4, value, np.float32) for name in names}
    write_tensors(folder, stem, {name: tensor.nbytes for name, tensor in tensors.items()}, tensors.__getitem__)


def read_values(folder):
    return {name: tensor.read().tolist() for name, tensor in stored_tensors(folder).items()}


@pytest.fixture
def shard_every_tensor(monkeypatch):
    """shard_every_tensor(): after the call, each tensor is written to a separate shard."""
    return lambda: monkeypatch.setattr(safetensors_io, "SHARD_BYTES", 16)


def test_shards_replace_a_single_file_and_a_single_file_replaces_shards(tmp_path, monkeypatch, shard_every_tensor):
    write_weights(tmp_path, 1.0)
    assert os.listdir(tmp_path) == [f"{STEM}.safetensors"]
    with monkeypatch.context():
        shard_every_tensor()
        write_weights(tmp_path, 2.0)
    shards = [f"{STEM}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert sorted(os.listdir(tmp_path)) == [*shards, f"{STEM}.safetensors.index.json"]
    assert read_values(tmp_path) == {"a": [2.0] * 4, "b": [2.0] * 4}
    monkeypatch.undo()
    write_weights(tmp_path, 3.0)
    assert os.listdir(tmp_path) == [f"{STEM}.safetensors"]
    assert read_values(tmp_path) == {"a": [3.0] * 4, "b": [3.0] * 4}


@pytest.mark.parametrize("sharded", [False, True])
def test_existing_files_stay_unchanged_if_writing_fails(tmp_path, shard_every_tensor, sharded):
    write_weights(tmp_path, 1.0)
    if sharded:
        shard_every_tensor()

    def fail_at_b(name):
        if name == "b":
            raise MemoryError
        return np.zeros(4, np.float32)

    with pytest.raises(MemoryError):
        write_tensors(tmp_path, STEM, {"a": 16, "b": 16}, fail_at_b)
    assert os.listdir(tmp_path) == [f"{STEM}.safetensors"]
    assert read_values(tmp_path) == {"a": [1.0] * 4, "b": [1.0] * 4}


def test_files_with_other_names_are_not_deleted(tmp_path):
    for name in ("model_ema.safetensors", "model-mine.safetensors", "notes.txt"):
        (tmp_path / name).write_text("mine")
    write_weights(tmp_path, 1.0, stem="model")
    assert {path.name for path in tmp_path.iterdir() if path.is_file() and path.read_bytes() == b"mine"} == {
        "model_ema.safetensors",
        "model-mine.safetensors",
        "notes.txt",
    }


def test_a_link_is_replaced_by_a_file_with_the_default_permissions(tmp_path):
    link_target = tmp_path / "theirs"
    link_target.write_text("theirs")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / f"{STEM}.safetensors").symlink_to(link_target)
    old_umask = os.umask(0o022)
    try:
        write_weights(tmp_path / "model", 1.0)
    finally:
        os.umask(old_umask)
    assert link_target.read_text() == "theirs"
    assert stat.S_IMODE((tmp_path / "model" / f"{STEM}.safetensors").lstat().st_mode) == 0o644


def write_index(folder, **weight_map):
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_overlapping_shards(folder):
    shutil.copy(folder / f"{STEM}.safetensors", folder / "b.safetensors")
    write_index(folder, a=f"{STEM}.safetensors", b="b.safetensors")


def truncate_file(folder):
    file = folder / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: write_index(folder, a="part-1.safetensors"),
            r"index.json lists shards that do not exist: part-1.safetensors; complete the download",
        ),
        (
            lambda folder: (folder / f"{STEM}.safetensors.index.json").write_text("{}"),
            r"index.json could not be read \(KeyError\('weight_map'\)\): expected JSON with weight_map",
        ),
        (
            write_overlapping_shards,
            r"diffusion_pytorch_model.safetensors and b.safetensors both hold the tensor a: expected it in one file",
        ),
        (truncate_file, r"diffusion_pytorch_model.safetensors could not be read \(.*\): download or write it again"),
        (lambda folder: (folder / f"{STEM}.safetensors").unlink(), r"has no safetensors file: expected diffusion_"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    write_weights(tmp_path, 1.0)
    damage(tmp_path)
    with pytest.raises(WeightError, match=message):
        stored_tensors(tmp_path)
