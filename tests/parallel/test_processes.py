"""Detection of launchers, assignment of GPUs, and runs of several processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ra_jax.checkpoints import find_checkpoint, read_metadata
from ra_jax.config.parse import from_flat_dict, to_toml
from ra_jax.config.settings import ParallelConfig
from ra_jax.errors import ConfigError
from ra_jax.parallel import processes as distributed
from ra_jax.parallel.processes import check_address, detect_launcher, local_gpu_ids, tasks_per_node
from ra_jax.reporting.trackers import read_rows


@pytest.fixture
def make_machine(tmp_path, monkeypatch):
    """A function that makes a machine with or without libtpu and with the given device files.

    The machine is a function from the path of a device file to its Path.
    """

    def make(libtpu: bool, *devices: str):
        monkeypatch.setattr(distributed, "find_spec", lambda name: object() if libtpu else None)
        for device in devices:
            (tmp_path / device.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / device.lstrip("/")).touch()
        return lambda path: tmp_path / Path(path).relative_to("/")

    return make


def test_launchers_are_detected_by_their_number_of_processes(make_machine):
    at = make_machine(False)
    assert detect_launcher({"SLURM_STEP_NUM_TASKS": "4"}, at) == "Slurm"
    assert detect_launcher({"OMPI_COMM_WORLD_SIZE": "2"}, at) == "Open MPI"
    assert detect_launcher({"SLURM_STEP_NUM_TASKS": "1"}, at) is None
    assert detect_launcher({}, at) is None


def test_a_tpu_machine_has_libtpu_its_device_files_and_may_use_them(make_machine):
    assert detect_launcher({}, make_machine(True, "/dev/vfio/0")) == "a TPU machine"
    assert detect_launcher({"JAX_PLATFORMS": "cpu"}, make_machine(True, "/dev/vfio/0")) is None
    assert detect_launcher({}, make_machine(False, "/dev/vfio/0")) is None  # devices of another kind


def test_processes_of_a_machine_share_its_gpus(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()

    def slurm(tasks, **more):
        return {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": "1", "SLURM_LOCALID": "1"} | more

    def mpi(size, rank):
        return {"OMPI_COMM_WORLD_LOCAL_SIZE": size, "OMPI_COMM_WORLD_LOCAL_RANK": rank}

    eight = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert local_gpu_ids(slurm("1(x4)", SLURM_LOCALID="0"), tmp_path) == [0, 1]
    assert local_gpu_ids(slurm("1(x4)", SLURM_LOCALID="0", **eight), tmp_path) == list(range(8))
    assert local_gpu_ids(slurm("8(x2)", **eight), tmp_path) == [1]
    assert local_gpu_ids(slurm("1,4", **eight), tmp_path) == [2, 3]
    assert local_gpu_ids(slurm("8", SLURM_NODEID="0", CUDA_VISIBLE_DEVICES="3"), tmp_path) == [
        0
    ]  # each process has GPUs of its own
    assert local_gpu_ids(slurm("2(x2)", SLURM_GPUS_PER_TASK="2", CUDA_VISIBLE_DEVICES="0,1"), tmp_path) == [0, 1]
    assert local_gpu_ids(slurm("2(x2)", CUDA_VISIBLE_DEVICES=""), tmp_path) is None
    assert local_gpu_ids(slurm("1(x4)"), tmp_path / "none") is None
    assert local_gpu_ids(mpi("1", "0"), tmp_path) == [0, 1]
    assert local_gpu_ids(mpi("2", "1") | slurm("1(x2)"), tmp_path) == [1]  # mpirun, started by Slurm
    assert local_gpu_ids(eight, tmp_path) is None


def test_slurms_list_of_tasks_per_node_is_parsed():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("16") == [16]


def test_an_open_mpi_that_jax_does_not_recognize_is_an_error(monkeypatch):
    for name in (*distributed.LAUNCHERS, distributed.OPEN_MPI_ADDRESS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"without OMPI_MCA_orte_hnp_uri.*--process_id \$OMPI_COMM_WORLD_RANK"):
        distributed.initialize(ParallelConfig())


def test_an_unusable_coordinator_address_is_refused():
    with pytest.raises(ConfigError, match=r"nobody.invalid:1234: the host cannot be resolved here"):
        check_address("nobody.invalid:1234", is_coordinator=False)
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        check_address(address, is_coordinator=False)
        with pytest.raises(ConfigError, match=r"process 0 cannot listen on port \d+ of this machine"):
            check_address(address, is_coordinator=True)
    check_address(address, is_coordinator=True)


@pytest.mark.slow
def test_two_processes_train_as_one_and_end_together(make_config_in, scored_scenes, tmp_path):
    """Only process 0 writes, both look at the held-out scenes, and SIGTERM to process 1 ends both with a checkpoint."""
    looks = {"validation_steps": 1000, "num_inference_steps": 2, "validation_scenes": 1}
    looks["val_json_path"] = str(scored_scenes / "triplets.json")
    standard = {"use_grpo": False, "use_human_scores": False, "enable_grpo_rewards": False, "enable_grpo_loss": False}
    config = make_config_in(tmp_path, mesh_fsdp=2, max_train_steps=1000, **standard, **looks)
    (tmp_path / "config.toml").write_text(to_toml(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "ra_jax.train", "--config", str(tmp_path / "config.toml"), "--num_processes", "2"]
    processes = [
        subprocess.Popen(
            [*command, "--coordinator_address", address, "--process_id", str(number)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    run = Path(config.run.output_dir)
    metrics = run / "metrics.jsonl"
    while all(process.poll() is None for process in processes):
        if metrics.exists() and len(read_rows(metrics)) >= 3:
            break
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    logs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, logs
    steps = [row["step"] for row in read_rows(metrics)]
    assert steps == list(range(len(steps)))
    assert read_metadata(find_checkpoint(run)).position == len(steps) - 1
    assert find_checkpoint(run, prefer_best=True).parts[-2:] == ("best", "0")
    assert [path.name for path in (run / "previews").iterdir()] == ["step_000000.png"]
    assert "look at step 0: held_out_reward" in logs[0] and "look at step 0" not in logs[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 2}, "num_processes without coordinator_address and process_id: give --coordinator_address"),
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
