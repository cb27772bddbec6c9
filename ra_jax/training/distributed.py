"""Several processes as one run: they find each other before JAX looks at its devices, and one speaks for all."""

import logging
import os
import re
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ra_jax.config import ConfigError, ParallelConfig

log = logging.getLogger(__name__)

# How many processes a launcher started, by its variable.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
OPEN_MPI_ADDRESS = "OMPI_MCA_orte_hnp_uri"
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def initialise(config: ParallelConfig) -> None:
    """`jax.distributed.initialize`, where the settings or the environment say that there are several processes.

    To be called before anything else of JAX. Slurm, Open MPI and TPU machines (Cloud TPU VMs, GKE) are recognised;
    elsewhere `--coordinator_address --num_processes --process_id` say it.

    Raises ConfigError for an Open MPI that does not tell JAX where its first process is.
    """
    if config.coordinator_address is not None:
        jax.distributed.initialize(config.coordinator_address, config.num_processes, config.process_id)
    elif launcher := launched_by(os.environ, Path("/").joinpath):
        log.info("several processes, started by %s", launcher)
        jax.distributed.initialize(local_device_ids=own_gpus(os.environ, Path("/dev")))
    else:
        return
    if jax.process_index():
        logging.getLogger("ra_jax").setLevel(logging.WARNING)  # process 0 tells what there is to tell
    log.info("process %d of %d, %d devices", jax.process_index(), jax.process_count(), jax.device_count())


def launched_by(environment: dict[str, str], at: Callable[[str], Path]) -> str | None:
    """The launcher of a run of several processes, or None; at: a path of the file system."""
    for variable, launcher in LAUNCHERS.items():
        if int(environment.get(variable, "1")) > 1:
            return launcher
    wanted = "tpu" in environment.get("JAX_PLATFORMS", "tpu") and find_spec("libtpu") is not None
    return "a TPU machine" if wanted and any(at(device).exists() for device in TPU_DEVICES) else None


def own_gpus(environment: dict[str, str], devices: Path) -> list[int] | None:
    """Which of the GPUs that it sees a process of Slurm or Open MPI takes; None: as JAX decides, the one of its rank on
    the machine. devices: the folder with the cards' device files.

    Raises ConfigError where JAX would not find the other processes.
    """
    if "OMPI_COMM_WORLD_SIZE" in environment and OPEN_MPI_ADDRESS not in environment:
        raise ConfigError(
            f"started by Open MPI, but without {OPEN_MPI_ADDRESS}, which versions before 5 set and JAX reads: give "
            "--coordinator_address HOST:PORT --num_processes $OMPI_COMM_WORLD_SIZE --process_id $OMPI_COMM_WORLD_RANK"
        )
    if "CUDA_VISIBLE_DEVICES" in environment:
        count = len(environment["CUDA_VISIBLE_DEVICES"].split(","))
    else:
        count = len([path for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()])
    tasks = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    alone = re.split(r"\D", tasks)[0] == "1"  # Slurm: "1(x4)", "2(x3),1"
    return list(range(count)) if count == 1 or (alone and count) else None


def refuse_other_data(digest: str, what: str) -> None:
    """Raise ConfigError unless every process has the same `digest` of `what`, in words."""
    if jax.process_count() == 1:
        return
    numbers = multihost_utils.process_allgather(np.asarray(zlib.crc32(digest.encode()), np.uint32))
    if len(set(numbers.tolist())) > 1:
        raise ConfigError(f"the processes do not have the same {what}: give all of them the same flags and files")


def is_speaker() -> bool:
    """Whether this process writes what is written once: metrics, previews, reports, the output folder's files."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Go on when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def all_stop(here: bool, step: int) -> bool:
    """Whether the run ends after `step`: this process was told to, `here`; of several any was, and all have heard."""
    return here if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
