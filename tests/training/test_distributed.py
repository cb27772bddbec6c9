"""Which launchers are recognised, and what they must not be mistaken for."""

from pathlib import Path

import pytest

from ra_jax.config import ConfigError, from_flat_dict
from ra_jax.training import distributed
from ra_jax.training.distributed import launched_by


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(libtpu, *devices) -> a function from a path to where it is on a machine with these device files."""

    def make(libtpu: bool, *devices: str):
        monkeypatch.setattr(distributed, "find_spec", lambda name: object() if libtpu else None)
        for device in devices:
            (tmp_path / device.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / device.lstrip("/")).touch()
        return lambda path: tmp_path / Path(path).relative_to("/")

    return make


def test_launchers_tell_by_their_number_of_processes(machine):
    at = machine(False)
    assert launched_by({"SLURM_STEP_NUM_TASKS": "4"}, at) == "Slurm"
    assert launched_by({"OMPI_COMM_WORLD_SIZE": "2"}, at) == "Open MPI"
    assert launched_by({"SLURM_STEP_NUM_TASKS": "1"}, at) is None
    assert launched_by({}, at) is None


def test_a_tpu_machine_has_libtpu_its_device_files_and_may_use_them(machine):
    assert launched_by({}, machine(True, "/dev/vfio/0")) == "a TPU machine"
    assert launched_by({"JAX_PLATFORMS": "cpu"}, machine(True, "/dev/vfio/0")) is None
    assert launched_by({}, machine(False, "/dev/vfio/0")) is None  # somebody else's devices


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 2}, "num_processes without the rest: give --coordinator_address"),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
            "process_id = 2: expected 0 to 1 with num_processes = 2",
        ),
        ({"mesh_fsdp": 0}, "mesh_fsdp = 0: expected a value at least 1"),
        ({"base_precision": "int8"}, "base_precision = int8 without use_lora"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        from_flat_dict({"train_json_path": "data.json", "output_dir": "run"} | flags)
