"""Checkpoints on disk: which ones remain and are found, how they are restored, and the names of their arrays."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.checkpoints import (
    BEST_DIR,
    CHECKPOINT_DIR,
    CheckpointMetadata,
    Checkpoints,
    check_base,
    find_checkpoint,
    read_metadata,
    restore,
)
from ra_jax.errors import CheckpointError

METADATA = {"config": {}, "base": "b"}


def save_steps(root, steps, **options):
    """Save a checkpoint for each of these steps, and return the open `Checkpoints`."""
    checkpoints = Checkpoints(root, **options)
    for step in steps:
        checkpoints.save(step, {"w": jnp.full(2, float(step))}, position=step, **METADATA)
    checkpoints.latest()  # waits for the saves
    return checkpoints


def step_numbers(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def test_a_broken_checkpoint_is_set_aside_so_that_its_step_can_be_saved_again(tmp_path, caplog):
    save_steps(tmp_path, [2, 4]).close()
    for expected in ("4.broken", "4.broken1"):
        (tmp_path / CHECKPOINT_DIR / "4" / "about/metadata").unlink()
        save_steps(tmp_path, [4]).close()
        assert f"checkpoints/4 is not complete, and is now {tmp_path}/checkpoints/{expected}" in caplog.text
        assert (tmp_path / CHECKPOINT_DIR / expected / "state").is_dir()
        assert find_checkpoint(tmp_path).name == "4" and not caplog.clear()
    assert step_numbers(tmp_path / CHECKPOINT_DIR) == [2, 4]


@pytest.mark.parametrize("name", ["run", BEST_DIR, CHECKPOINT_DIR])
def test_find_checkpoint_returns_the_latest_or_the_best(tmp_path, name):
    """The output folder itself may have the name of a folder of checkpoints."""
    root = tmp_path / name

    def found(*folders, **options):
        return find_checkpoint(root.joinpath(*folders), **options).relative_to(root).as_posix()

    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_checkpoint(root)
    save_steps(root, [5], folder=BEST_DIR, limit=1).close()
    assert found() == found(BEST_DIR) == "best/5"
    save_steps(root, [3]).close()
    assert found() == found(prefer_best=True) == "best/5" and found(CHECKPOINT_DIR) == "checkpoints/3"
    save_steps(root, [5]).close()
    assert found() == "checkpoints/5" and found(prefer_best=True) == "best/5"
    save_steps(root, [7]).close()
    assert found() == "checkpoints/7" and found(prefer_best=True) == found(BEST_DIR) == "best/5"


@pytest.mark.parametrize("file", ["about/metadata", "state/manifest.ocdbt", "state/d", "state", "."])
def test_a_checkpoint_without_some_of_its_files_is_not_found(tmp_path, caplog, file):
    save_steps(tmp_path, [3, 5]).close()
    damaged = tmp_path / CHECKPOINT_DIR / "5" / file
    if damaged.is_dir():
        shutil.rmtree(damaged)
        damaged.mkdir(exist_ok=True)
    else:
        damaged.unlink()
    assert find_checkpoint(tmp_path).name == "3"
    assert f"{tmp_path}/checkpoints/5: files of this checkpoint are missing; using" in caplog.text
    shutil.rmtree(tmp_path / CHECKPOINT_DIR / "3")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*checkpoints/5: files are missing"):
        find_checkpoint(tmp_path)


def test_a_broken_best_checkpoint_is_named_if_another_one_is_used_for_its_weights(tmp_path, caplog):
    save_steps(tmp_path, [5]).close()
    save_steps(tmp_path, [3], folder=BEST_DIR).close()
    (tmp_path / BEST_DIR / "3" / "about/metadata").unlink()
    assert find_checkpoint(tmp_path).name == "5" and not caplog.text
    assert find_checkpoint(tmp_path, prefer_best=True).name == "5"
    assert f"{tmp_path}/best/3: files of this checkpoint are missing; using" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: next((folder / "state/d").iterdir()).write_bytes(b"\0\0"),
        lambda folder: (folder / "state/manifest.ocdbt").write_bytes(b"none"),
        lambda folder: shutil.rmtree(folder / "state"),
        lambda folder: (folder / "about/metadata").write_text("{"),
        lambda folder: (folder / "about/metadata").write_text('{"step": 1}'),
        lambda folder: (folder / "about/metadata").unlink(),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    folder = save_state(tmp_path, {"w": jnp.zeros(2)})
    damage(folder)
    with pytest.raises(CheckpointError, match=f"checkpoint {folder} cannot be read, files of it are missing or damag"):
        restore(folder, {"w": jnp.zeros(2)})


def test_checkpoints_beyond_the_limit_are_deleted(tmp_path):
    checkpoints = save_steps(tmp_path, [1, 2, 3], limit=1)
    assert checkpoints.latest().name == "3"
    checkpoints.close()
    assert step_numbers(tmp_path / "checkpoints") == [3]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A train state. Its field `old_params` has the name `snapshot` on disk."""

    trainable: Any
    old_params: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StateOf01:
    """The same state with the field name of releases before 0.2."""

    trainable: Any
    snapshot: Any


def make_weights(value):
    return {"flux": {"kernel": jnp.full((2, 3), value)}, "router": {"bias": jnp.full(2, value + 0.5)}}


def save_state(folder, state) -> Path:
    """Save a state as step 1; return the checkpoint's folder."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state, position=1, **METADATA)
    checkpoints.close()
    return find_checkpoint(folder)


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_old_params_have_the_name_of_older_releases_on_disk(tmp_path):
    checkpoint = save_state(tmp_path, State(make_weights(1.0), make_weights(2.0)))
    names = {"flux/kernel", "router/bias"}
    assert set(read_metadata(checkpoint).geometry) == {
        f"{part}/{name}" for part in ("trainable", "snapshot") for name in names
    }
    assert_equal_trees(
        restore(checkpoint, StateOf01(make_weights(0.0), make_weights(0.0))),
        StateOf01(make_weights(1.0), make_weights(2.0)),
    )


def test_a_checkpoint_of_an_older_release_can_be_restored(tmp_path):
    checkpoint = save_state(tmp_path, StateOf01(make_weights(1.0), make_weights(2.0)))
    assert_equal_trees(
        restore(checkpoint, State(make_weights(0.0), make_weights(0.0))), State(make_weights(1.0), make_weights(2.0))
    )


@pytest.mark.parametrize("part", ["old_params", "snapshot"])
def test_a_part_of_a_state_can_be_restored_by_its_name_in_code_or_on_disk(tmp_path, part):
    checkpoint = save_state(tmp_path, State(make_weights(1.0), make_weights(2.0)))
    assert_equal_trees(restore(checkpoint, make_weights(0.0), prefix=part), make_weights(2.0))
    router = restore(checkpoint, make_weights(0.0)["router"], prefix=f"{part}/router")
    assert_equal_trees(router, make_weights(2.0)["router"])


def test_only_parts_of_a_state_have_another_name_on_disk(tmp_path):
    """A leaf named `old_params` inside a part keeps its name."""
    checkpoint = save_state(tmp_path, {"trainable": {"old_params": jnp.ones(2)}})
    assert set(read_metadata(checkpoint).geometry) == {"trainable/old_params"}


def test_the_message_for_another_geometry_has_the_names_on_disk(tmp_path):
    checkpoint = save_state(tmp_path, State(make_weights(1.0), None))
    with pytest.raises(
        CheckpointError, match=r"another geometry \(2 arrays differ\):\n  snapshot/flux/kernel: this model"
    ):
        restore(checkpoint, State(make_weights(0.0), make_weights(0.0)))


def test_a_checkpoint_of_another_base_is_refused():
    metadata = CheckpointMetadata(position=0, base="one", config={}, geometry={})
    check_base(Path("there"), metadata, "one")
    message = r"checkpoint there was trained on another base \(fingerprint one, this one has two\): give the Fill and"
    with pytest.raises(CheckpointError, match=message):
        check_base(Path("there"), metadata, "two")
