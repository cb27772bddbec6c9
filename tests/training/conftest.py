"""Configurations of tiny runs on the shared model and scenes."""

from pathlib import Path

import pytest

from ra_jax.config import from_flat_dict

HUMAN = {"use_grpo": True, "use_human_scores": True, "enable_grpo_rewards": True, "enable_grpo_loss": True}


@pytest.fixture(scope="session")
def config_in(tiny_fill, tiny_redux, scored_scenes):
    """config_in(folder, **flags) -> TrainConfig: three experts of rank 2, human-scored, unless flags say otherwise."""

    def make(folder: Path, **flags):
        settings = {
            "train_json_path": str(scored_scenes / "labeled_dict.json"),
            "output_dir": str(folder / "run"),
            "pretrained_model_name_or_path": str(tiny_fill),
            "pretrained_redux_model_name_or_path": str(tiny_redux),
            "aspect_ratio_buckets": "32,32",
            "mixed_precision": "no",
            "gradient_checkpointing": "none",
            "max_sequence_length": 8,
            "train_batch_size": 8,
            "max_train_steps": 4,
            "learning_rate": 0.01,
            "policy_sync_steps": 3,
            "num_policy_timesteps": 2,
            "policy_loss_weight": 1.0,
            "validation_steps": 0,
            "checkpointing_steps": 0,
            "report_to": ["none"],
            "log_freq": 1,
            "data_workers": 0,
        }
        experts = {"use_lora": True, "lora_rank": 2, "lora_alpha": 2.0} if flags.get("use_lora", True) else {}
        return from_flat_dict(settings | experts | HUMAN | flags)

    return make


@pytest.fixture
def make_config(config_in, tmp_path):
    """make_config(**flags) -> TrainConfig of a run in the test's own folder."""
    return lambda **flags: config_in(tmp_path, **flags)
