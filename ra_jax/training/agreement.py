"""Agreement between the processes of a run: all of them have the same plan, or none of them begins."""

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

# Settings that may differ between the processes of a run: where files lie on a machine, and which process it is.
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
    """What decides which rows a step takes, which program it is and when something else is due, by what it is in words.

    With other plans processes would wait for each other in different steps.
    """
    settings = to_flat_dict(config)
    return {
        f"records ({config.data.train_json_path})": record_signature(records),
        f"records to preview ({config.data.val_json_path})": record_signature(held_out),
        "checkpoint to resume from": None if resume_from is None else resume_from.name,
        "settings": {name: value for name, value in settings.items() if name not in PER_PROCESS_SETTINGS},
    }


def record_signature(records: Sequence[Record]) -> list[tuple]:
    """All that files of records say but where the pictures are."""
    scenes = scene_ids(records).tolist()
    return [
        (record.id, scene, record.size, record.scores, record.result is None)
        for record, scene in zip(records, scenes, strict=True)
    ]


def check_same_plan(plan: Mapping[str, object]) -> None:
    """Raise ConfigError unless every process has the same plan: what steps depend on, by what it is in words."""
    if jax.process_count() == 1:
        return
    digests = np.asarray([zlib.crc32(repr(part).encode()) for part in plan.values()], np.uint32)
    same = (multihost_utils.process_allgather(digests) == digests).all(axis=0)
    if other := [name for name, agreed in zip(plan, same, strict=True) if not agreed]:
        raise ConfigError(
            f"the processes do not have the same {' and '.join(other)}: give all of them the same flags and files"
        )
