"""Several processes as one run: they find each other before JAX looks at its devices, and one speaks for all."""

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from ra_jax.config import ParallelConfig

log = logging.getLogger(__name__)

# How many processes a launcher started, by its variable.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def initialise(config: ParallelConfig) -> None:
    """`jax.distributed.initialize`, where the settings or the environment say that there are several processes.

    To be called before anything else of JAX. Slurm, Open MPI and TPU machines (Cloud TPU VMs, GKE) are recognised;
    elsewhere `--coordinator_address --num_processes --process_id` say it.
    """
    if config.coordinator_address is not None:
        jax.distributed.initialize(config.coordinator_address, config.num_processes, config.process_id)
    elif launcher := launched_by(os.environ, Path("/").joinpath):
        log.info("several processes, started by %s", launcher)
        # Left to itself JAX gives each process of Slurm or Open MPI one GPU, whatever it was given.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        ids = None if visible is None else list(range(len(visible.split(","))))
        jax.distributed.initialize(local_device_ids=ids)
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
