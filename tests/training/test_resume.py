"""Resumed runs: settings that they keep from their checkpoint."""

import pytest

from ra_jax.checkpoints import CheckpointMetadata
from ra_jax.config.parse import from_flat_dict
from ra_jax.training import resume
from ra_jax.training.resume import keep_data_settings


@pytest.mark.parametrize(
    ("saved", "given", "expected"),
    [
        ({}, {}, (0.0, 0)),  # a run of 0.1.0: it held nothing out and kept all checkpoints
        ({"checkpoints_total_limit": None}, {}, (0.0, 0)),
        ({"checkpoints_total_limit": 7}, {}, (0.0, 7)),
        ({"validation_split": 0.0, "checkpoints_total_limit": 0}, {}, (0.0, 0)),  # such a run, resumed before
        ({"validation_split": 0.1, "checkpoints_total_limit": 3}, {}, (0.1, 3)),
        ({}, {"validation_split": 0.2, "checkpoints_total_limit": 2}, (0.2, 2)),  # flags that differ from the defaults
    ],
)
def test_a_resumed_run_keeps_its_held_out_photos_and_its_checkpoints(monkeypatch, saved, given, expected):
    monkeypatch.setattr(resume, "read_metadata", lambda checkpoint: CheckpointMetadata(0, "", saved, {}))
    config = from_flat_dict({"train_json_path": "data.json", "output_dir": "run"} | given)
    kept = keep_data_settings(config, "checkpoint")
    assert (kept.data.validation_split, kept.run.checkpoints_total_limit) == expected
