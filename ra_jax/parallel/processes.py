"""Runs of several processes: initializes `jax.distributed` before any device is used, and synchronizes processes."""

import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from ra_jax.config.settings import ParallelConfig
from ra_jax.errors import ConfigError

log = logging.getLogger(__name__)

# Environment variables that hold the number of processes, with the launchers that set them.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
OPEN_MPI_ADDRESS = "OMPI_MCA_orte_hnp_uri"
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def initialize(config: ParallelConfig) -> None:
    """Call `jax.distributed.initialize` if the settings or the environment specify several processes.

    This must precede any other use of JAX. Slurm, Open MPI and TPU machines (Cloud TPU VMs, GKE) are detected;
    elsewhere the flags `--coordinator_address --num_processes --process_id` are needed.

    Raises ConfigError for an unresolvable host, for a port of this machine that is in use, and for versions of Open MPI
    that do not set the variable from which JAX reads the address of process 0.
    """
    gpus = local_gpu_ids(os.environ, Path("/dev"))
    if config.coordinator_address is not None:
        check_address(config.coordinator_address, is_coordinator=config.process_id == 0)
        log.info("waiting for %d processes at %s", config.num_processes, config.coordinator_address)
        jax.distributed.initialize(config.coordinator_address, config.num_processes, config.process_id, gpus)
    elif launcher := detect_launcher(os.environ, Path("/").joinpath):
        if launcher == "Open MPI" and OPEN_MPI_ADDRESS not in os.environ:
            raise ConfigError(
                f"started by Open MPI, but without {OPEN_MPI_ADDRESS}, which JAX reads and only versions before 5 set: "
                "give --coordinator_address HOST:PORT --num_processes $OMPI_COMM_WORLD_SIZE "
                "--process_id $OMPI_COMM_WORLD_RANK"
            )
        log.info("several processes, started by %s", launcher)
        jax.distributed.initialize(local_device_ids=gpus)
    else:
        return
    if jax.process_index():
        logging.getLogger("ra_jax").setLevel(logging.WARNING)  # only process 0 logs progress
    log.info("process %d of %d, %d devices", jax.process_index(), jax.process_count(), jax.device_count())


def detect_launcher(environment: dict[str, str], device_path: Callable[[str], Path]) -> str | None:
    """Return the launcher of a run of several processes; None if the environment shows none.

    `device_path` maps the name of a device file to its Path.
    """
    for variable, launcher in LAUNCHERS.items():
        if int(environment.get(variable, "1")) > 1:
            return launcher
    may_use_tpu = "tpu" in environment.get("JAX_PLATFORMS", "tpu") and find_spec("libtpu") is not None
    has_tpu = any(device_path(device).exists() for device in TPU_DEVICES)
    return "a TPU machine" if may_use_tpu and has_tpu else None


def check_address(address: str, *, is_coordinator: bool) -> None:
    """Raise ConfigError if the host of HOST:PORT cannot be resolved, or if the port is in use on the coordinator.

    Without this check JAX would wait five minutes for an unresolvable host. In both cases gRPC would end the process
    without naming the host or the port.

    Args:
        address: HOST:PORT.
        is_coordinator: whether this process listens on the port.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise ConfigError(
            f"coordinator_address = {address}: the host cannot be resolved here ({error}); give the host of process 0"
        ) from error
    if is_coordinator:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ConfigError(
                f"coordinator_address = {address}: process 0 cannot listen on port {port} of this machine ({error}); "
                "give all processes another port"
            ) from error


def local_gpu_ids(environment: Mapping[str, str], devices: Path) -> list[int] | None:
    """Return the indices of the visible GPUs that this process uses in a run that Slurm or Open MPI started.

    If the processes of a machine see the same GPUs, each process uses an equal part of them. If each process sees only
    its own GPUs, it uses all of them. Returns None if there are no GPUs, or if neither Slurm nor Open MPI specifies how
    many processes this machine has.

    Args:
        environment: the environment variables.
        devices: the folder of device files (nvidia0, nvidia1, …).
    """
    if "CUDA_VISIBLE_DEVICES" in environment:
        count = len([name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name])
    else:
        count = len([path for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()])
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        processes, rank = (int(environment[f"OMPI_COMM_WORLD_LOCAL_{name}"]) for name in ("SIZE", "RANK"))
    elif "SLURM_STEP_TASKS_PER_NODE" in environment:
        nodes = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        processes, rank = nodes[int(environment["SLURM_NODEID"])], int(environment["SLURM_LOCALID"])
    else:
        return None
    if not count:
        return None
    if count < processes or "SLURM_GPUS_PER_TASK" in environment:  # each process sees only its own GPUs
        return list(range(count))
    gpus = count // processes
    return list(range(rank * gpus, (rank + 1) * gpus))


def tasks_per_node(text: str) -> list[int]:
    """Parse Slurm's list of the number of tasks on each node: "2(x3),1" is [2, 2, 2, 1]."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(part[1]) for part in parts for _ in range(int(part[2] or 1))]


def is_main_process() -> bool:
    """Return whether this is process 0, which writes metrics, previews, reports and the output folder's other files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes have reached the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def should_stop(received_sigterm: bool, step: int) -> bool:
    """Return whether SIGTERM ends the run after `step`.

    With one process, the run ends if this process has received SIGTERM. With several processes, the run ends if any of
    them has. JAX then chooses the step, the same for all processes.
    """
    return received_sigterm if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
