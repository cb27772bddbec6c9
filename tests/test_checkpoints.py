"""Checkpoints on disk: which are kept, found and forgotten."""

import jax.numpy as jnp
import pytest

from ra_jax.checkpoints import BEST, Checkpoints, find_checkpoint
from ra_jax.errors import CheckpointError

ABOUT = {"config": {}, "base": "b"}


def saved(root, steps, **where):
    """Checkpoints of these steps; the object is left open."""
    checkpoints = Checkpoints(root, **where)
    for step in steps:
        checkpoints.save(step, {"w": jnp.full(2, float(step))}, position=step, **ABOUT)
    checkpoints.latest()  # waits
    return checkpoints


def names(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def test_what_was_saved_after_a_step_is_forgotten(tmp_path):
    checkpoints = saved(tmp_path, [2, 4, 6], folder=BEST)
    checkpoints.forget_after(4)
    assert checkpoints.latest().name == "4"
    checkpoints.save(5, {"w": jnp.zeros(2)}, position=5, **ABOUT)  # a run that comes by again may save there
    assert checkpoints.latest().name == "5"
    checkpoints.close()
    assert names(tmp_path / BEST) == [2, 4, 5]


def test_the_latest_is_found_and_the_best_where_there_is_no_other(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_checkpoint(tmp_path)
    saved(tmp_path, [7], folder=BEST, limit=1).close()
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / BEST) == (tmp_path / BEST / "7").resolve()
    saved(tmp_path, [3, 5]).close()
    assert find_checkpoint(tmp_path).parts[-2:] == ("checkpoints", "5")
    assert find_checkpoint(tmp_path / BEST).name == "7"


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = saved(tmp_path, [1, 2, 3], limit=1)
    assert checkpoints.latest().name == "3"
    checkpoints.close()
    assert names(tmp_path / "checkpoints") == [3]
