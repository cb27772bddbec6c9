"""A run does not start if its processes have different plans."""

import shutil
import zlib

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from ra_jax.errors import ConfigError
from ra_jax.parallel.agreement import check_same_plan, run_signature
from ra_jax.training.dataset import load_training_records
from ra_jax.training.setup import set_up


@pytest.fixture
def add_process(monkeypatch):
    """A function that simulates a second process, which has the given plan."""

    def use(plan):
        other = np.asarray([zlib.crc32(repr(part).encode()) for part in plan.values()], np.uint32)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.stack([own, other]))

    return use


def test_processes_with_different_plans_are_refused(add_process):
    plan = {"records": [1, 2], "settings": {"a": 1}}
    check_same_plan(plan | {"records": [2]})
    add_process(plan)
    check_same_plan(plan)
    with pytest.raises(ConfigError, match="the processes do not have the same records: give"):
        check_same_plan(plan | {"records": [2, 1]})
    with pytest.raises(ConfigError, match="the same records and settings: give"):
        check_same_plan({"records": [], "settings": {}})


def test_a_plan_depends_on_file_contents_and_not_on_paths(make_config, scored_scenes, tmp_path, add_process):
    config = make_config()
    records = load_training_records(config)
    plan = run_signature(config, records, records, None)
    elsewhere = shutil.copytree(scored_scenes, tmp_path / "elsewhere") / "labeled_dict.json"
    moved = make_config(train_json_path=str(elsewhere), data_workers=2, output_dir=str(tmp_path / "other"))
    same = run_signature(moved, load_training_records(moved), records, None)
    assert list(same.values()) == list(plan.values())

    def differs(config, records, held_out, resume_from):
        other = run_signature(config, records, held_out, resume_from)
        return [name.split(" (")[0] for name in plan if other[name] != plan[name]]

    assert differs(config, records[::-1], records, None) == ["records"]
    assert differs(config, records, records[:1], None) == ["records to preview"]
    assert differs(config, records, records, tmp_path / "4") == ["checkpoint to resume from"]
    assert differs(make_config(learning_rate=0.02), records, records, None) == ["settings"]
    add_process(plan | {next(iter(plan)): None})
    with pytest.raises(ConfigError, match=r"the same records \(.*labeled_dict.json\): give"):
        set_up(config)


def test_processes_with_another_base_are_refused(make_config, monkeypatch):
    def gather(own):
        """Simulates another process with the same plan and another base."""
        return np.stack([own, own if own.size > 1 else own + 1])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    with pytest.raises(ConfigError, match="the processes do not have the same base model"):
        set_up(make_config())
