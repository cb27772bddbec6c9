"""Compare human scores with automatic rewards, and train on both in turn.

    python scripts/experiments/two_sources.py agree PHOTOS   prints rank correlations of scores and rewards
    python scripts/experiments/two_sources.py train          trains on human scores, then on automatic rewards

PHOTOS is a folder with labeled_dict.json (scored results) and triplets.json (ground truths). `train` makes the demo's
data and base if they do not exist yet. Automatic GRPO starts from the experts of human-scored GRPO. A table compares
the removals of the base and of both runs on held-out scenes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from held_out import (
    decode_encoded_truth,
    generate_removals,
    make_scenes,
    measure_rewards,
    run_commands,
)
from scipy.stats import spearmanr

from ra_jax.config.parse import from_flat_dict, load_toml
from ra_jax.config.settings import DEFAULT_REWARD_WEIGHTS as WEIGHTS
from ra_jax.data.records import load_records, scene_ids
from ra_jax.demo.prepare import FIRST_HELD_OUT_SCENE, DemoSettings, prepare
from ra_jax.evaluation.measure import Evaluation, Networks
from ra_jax.evaluation.pairs import find_pairs
from ra_jax.rewards.registry import SCORES, total_reward
from ra_jax.training.loop import train as train_experts

CONFIGS = {"human": Path("configs/tiny.toml"), "automatic": Path("configs/tiny_auto.toml")}
# In triplets.json the results are the ground truth. The default rewards then compare with it.
DATA = {"human": "labeled_dict.json", "automatic": "triplets.json"}
SCENES = (FIRST_HELD_OUT_SCENE + 40_000, 64)  # number of the first scene, number of scenes
NUM_INFERENCE_STEPS = 12


@dataclass(frozen=True)
class Training:
    """Settings of `train`."""

    root: Path = Path("output/two_sources")  # folder of both runs
    demo: Path = Path("output/demo")  # the demo's folder; it is made if it does not exist
    steps: int | None = None  # training steps of each run; None: as in its configuration


def agree(photos: Annotated[Path, tyro.conf.Positional]) -> None:
    """Print Spearman's rank correlation of human scores and automatic rewards, over all results and within scenes."""
    records = load_records(photos / "labeled_dict.json", use_human_scores=True)
    pairs = {pair.result: pair for pair in find_pairs(photos / "labeled_dict.json", photos / "triplets.json")}
    evaluation = Evaluation([pairs[record.result] for record in records], WEIGHTS, Networks())
    list(evaluation.measure())
    human = np.asarray([record.scores for record in records])
    rewards = np.asarray([[row[name] for name in SCORES] for row in evaluation.rows])
    human = np.column_stack([human, total_reward(human, WEIGHTS)])
    rewards = np.column_stack([rewards, total_reward(rewards, WEIGHTS)])
    scenes = scene_ids(records)
    print(f"{len(records)} scored results of {scenes.max() + 1} scenes\n")
    print("| score | rank correlation, all results | median within a scene |\n| --- | --- | --- |")
    for i, name in enumerate((*SCORES, "total reward")):
        by_scene = [
            spearmanr(human[scenes == s, i], rewards[scenes == s, i]).statistic for s in range(scenes.max() + 1)
        ]
        print(f"| {name} | {spearmanr(human[:, i], rewards[:, i]).statistic:.2f} | {np.nanmedian(by_scene):.2f} |")


def train(training: Training) -> None:
    """Train with human scores (configs/tiny.toml), then automatic rewards (configs/tiny_auto.toml); print the table."""
    paths, runs = prepare(training.demo, DemoSettings()), {}
    for name, file in CONFIGS.items():
        settings = load_toml(file) | {
            "train_json_path": str(paths.train / DATA[name]),
            "val_json_path": str(paths.held_out / "triplets.json"),
            "pretrained_model_name_or_path": str(paths.fill),
            "pretrained_redux_model_name_or_path": str(paths.redux),
            "output_dir": str(training.root / name),
            "overwrite_output_dir": True,
        }
        if runs:
            settings |= {"init_experts_from": str(runs["human"]), "reward_functions": []}
        if training.steps is not None:
            settings |= {"max_train_steps": training.steps}
        runs[name] = train_experts(from_flat_dict(settings))
    base, scenes = (paths.fill, paths.redux, CONFIGS["automatic"]), make_scenes(*SCENES)
    decoded_truth = decode_encoded_truth(*base, scenes)
    print("\n| experts | reward | " + " | ".join(SCORES) + " | PSNR |\n" + "| --- " * 6 + "|")
    for name, run in {"none: the base": None, **runs}.items():
        images = generate_removals(*base, scenes, run, num_inference_steps=NUM_INFERENCE_STEPS)
        measured = measure_rewards(images, scenes, decoded_truth)
        scores = measured["scores"]
        means = " | ".join(f"{value:.3f}" for value in scores.mean(0))
        print(f"| {name} | {total_reward(scores, WEIGHTS).mean():.3f} | {means} | {np.mean(measured['psnr']):.2f} |")


if __name__ == "__main__":
    run_commands({"agree": agree, "train": train})
