"""Checks, before a run starts, that all of its processes have the same plan."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ra_jax.config.parse import to_flat_dict
from ra_jax.config.settings import TrainConfig
from ra_jax.data.records import Record, scene_ids
from ra_jax.errors import ConfigError

# Settings that may differ between the processes of a run: local paths, the number of loader threads, the coordinator's
# address as this process reaches it, and the process id.
PER_PROCESS_SETTINGS = {
    "train_json_path",
    "val_json_path",
    "output_dir",
    "pretrained_model_name_or_path",
    "pretrained_redux_model_name_or_path",
    "init_experts_from",
    "resume_from_checkpoint",
    "jax_compilation_cache_dir",
    "data_workers",
    "coordinator_address",
    "process_id",
}


def run_signature(
    config: TrainConfig, records: Sequence[Record], held_out: Sequence[Record], resume_from: Path | None
) -> dict[str, object]:
    """Collect everything that determines the rows and the program of a step, and when checkpoints and previews are due.

    If the processes differed in any of this, they would wait for each other in different steps.

    Args:
        config: the run's configuration.
        records: the records to train on.
        held_out: the records for previews and drift.
        resume_from: the checkpoint to resume from; None for a new run.

    Returns:
        The parts of the plan. The keys are the names that error messages use for the parts.
    """
    settings = to_flat_dict(config)
    return {
        f"records ({config.data.train_json_path})": record_signature(records),
        f"records to preview ({config.data.val_json_path})": record_signature(held_out),
        "checkpoint to resume from": None if resume_from is None else resume_from.name,
        "settings": {name: value for name, value in settings.items() if name not in PER_PROCESS_SETTINGS},
    }


def record_signature(records: Sequence[Record]) -> list[tuple]:
    """Summarize records without their image paths: id, scene, photo size, scores, and whether a result is missing."""
    scenes = scene_ids(records).tolist()
    return [
        (record.id, scene, record.size, record.scores, record.result is None)
        for record, scene in zip(records, scenes, strict=True)
    ]


def check_same_plan(plan: Mapping[str, object]) -> None:
    """Raise ConfigError unless every process has the same plan.

    Args:
        plan: the parts to compare. The keys are the names that the error message uses for the parts.
    """
    if jax.process_count() == 1:
        return
    digests = np.asarray([zlib.crc32(repr(part).encode()) for part in plan.values()], np.uint32)
    equal = (multihost_utils.process_allgather(digests) == digests).all(axis=0)
    if differing := [name for name, is_equal in zip(plan, equal, strict=True) if not is_equal]:
        raise ConfigError(
            f"the processes do not have the same {' and '.join(differing)}: give all of them the same flags and files"
        )
