"""Configurations of tiny runs on the shared model and scenes, and what tests of steps and runs do with them.

config_in, make_config  human-scored runs, or what flags make of them
automatic, photos       runs on automatic rewards, and flags for photos without results
steps_of                steps of a set-up
changed                 which leaves of two trees differ
dies_at                 a run that is killed before a batch
"""

import json
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest

from ra_jax.config import from_flat_dict
from ra_jax.data.loader import Loader
from ra_jax.training.checkpoints import named_leaves

FEW_LAYERS = r".*\.(to_q|to_add_out|proj_mlp)"  # of both kinds of blocks: a smaller program than with all of them
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
        experts = {"use_lora": True, "lora_rank": 2, "lora_alpha": 2.0, "target_modules": FEW_LAYERS}
        experts = experts if flags.get("use_lora", True) else {}
        return from_flat_dict(settings | experts | HUMAN | flags)

    return make


@pytest.fixture
def make_config(config_in, tmp_path):
    """make_config(**flags) -> TrainConfig of a run in the test's own folder."""
    return lambda **flags: config_in(tmp_path, **flags)


@pytest.fixture(scope="session")
def photos(scored_scenes, tmp_path_factory):
    """Photos and masks without results: nothing but rewards to learn from, which makes for small programs."""
    records = json.loads((scored_scenes / "labeled_dict.json").read_text())[::4]
    for record in records:
        del record["result"], record["scores"]
        for name in ("src", "mask", "ref"):
            record[name] = str(scored_scenes / record[name])
    path = tmp_path_factory.mktemp("photos") / "photos.json"
    path.write_text(json.dumps(records))
    return {"train_json_path": str(path), "base_loss_weight": 0.0}


@pytest.fixture(scope="session")
def automatic(config_in, scored_scenes, tmp_path_factory):
    """automatic(**flags) -> TrainConfig of a run in a folder of its own: 2 conditions of 3 rollouts of 6 steps."""

    def make(**flags):
        settings = {
            "train_json_path": str(scored_scenes / "triplets.json"),
            "use_human_scores": False,
            "num_generations": 3,
            "rollout_steps": 6,
            "train_batch_size": 2,
            "decode_batch_size": 8,
        }
        return config_in(tmp_path_factory.mktemp("automatic"), **settings | flags)

    return make


@pytest.fixture(scope="session")
def steps_of():
    """steps_of(setup, count) -> the state after so many steps, and the metrics of each."""

    def run(setup, count):
        step, state, rows = setup.step_programs(), setup.state, []
        for number, batch in enumerate(islice(setup.batches(), count)):
            state, row = step(state, setup.frozen, batch, number)
            rows.append({name: float(value) for name, value in jax.device_get(row).items()})
        return state, rows

    return run


@pytest.fixture(scope="session")
def changed():
    """changed(before, after) -> names of the leaves that differ."""

    def names(before, after):
        before, after = named_leaves(before), named_leaves(after)
        assert before.keys() == after.keys()
        return {name for name in before if not np.array_equal(before[name], after[name])}

    return names


@pytest.fixture
def dies_at(monkeypatch):
    """dies_at(batch, run): `run()` is interrupted when it asks for that batch (from 0)."""

    def interrupted(batch, run):
        iterate = Loader.iterate

        def dies(self, start=0):
            for i, found in enumerate(iterate(self, start), start):
                if i == batch:
                    raise KeyboardInterrupt
                yield found

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Loader, "iterate", dies)
            run()

    return interrupted
