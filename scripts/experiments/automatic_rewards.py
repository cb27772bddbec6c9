"""Compare GRPO on automatic rewards, by each policy estimator, with standard training of the same duration.

    python scripts/experiments/automatic_rewards.py run     trains and measures every cell
    python scripts/experiments/automatic_rewards.py table   prints tables, draws the figure

All files are below --root (output/automatic). Every training starts from the demo's base and uses the demo's training
scenes (`python -m ra_jax.demo`). There are two sets of pairs:

    flawed   results with casts, ghosts, seams and blur, one for each scene, not scored; rewards without ground truth
    truth    the ground truth as result; rewards that compare with it

The trainings are GRPO with each estimator (contrast, matching, sde, nft), `chance`, `contrast_chance` and `standard`.
`chance` is `matching` with a random reward. `contrast_chance` is `contrast` with it, at the strength that `contrast`
has chosen, so `contrast` is trained first. `standard` takes as long as `matching` by the clock. At several checkpoints
each model removes the objects of held-out scenes, which were used neither for training nor to choose settings. The
automatic rewards and PSNR compare the images with the ground truth. The experiment also reports drift: how far the
velocities are from the base's.

A cell is one training (pairs, method, seed) and the file of its measurements.
"""

import json
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from held_out import (
    HeldOutScenes,
    bootstrap_interval,
    decode_encoded_truth,
    make_scenes,
    measure_rewards,
    read_state,
    run_commands,
    save_figure,
    write_json,
)
from matplotlib import pyplot as plt

from ra_jax.checkpoints import find_checkpoint
from ra_jax.config.parse import from_flat_dict, load_toml, to_flat_dict
from ra_jax.config.settings import DEFAULT_REWARD_WEIGHTS as WEIGHTS
from ra_jax.config.settings import TrainConfig
from ra_jax.data.synthetic import measure_defects
from ra_jax.demo.prepare import FIRST_HELD_OUT_SCENE, DemoPaths, DemoSettings, prepare
from ra_jax.reporting.trackers import read_rows
from ra_jax.rewards.registry import SCORES, RewardInputs, total_reward
from ra_jax.training.loop import train

PROBE_STEPS = 120  # length of the run that measures the time of a step of standard training
AUTOMATIC = {"use_grpo": True, "enable_grpo_rewards": True, "enable_grpo_loss": True}
# Settings of the estimators that have no fixed point: the learning rate falls to 0, and no time is left out.
FALLING = {"learning_rate": 2e-3, "lr_scheduler": "linear", "policy_timestep_fraction": 1.0}
MATCHING = AUTOMATIC | FALLING | {"policy_estimator": "matching", "policy_loss_weight": 1.0, "policy_temperature": 0.1}
METHODS = {
    "standard": dict.fromkeys(AUTOMATIC, False) | {"policy_estimator": "auto", "reward_functions": []},
    "contrast": AUTOMATIC,
    "contrast_chance": AUTOMATIC | {"reward_functions": ["automatic_rewards:chance"]},
    "matching": MATCHING,
    "sde": AUTOMATIC | FALLING | {"policy_estimator": "sde", "policy_loss_weight": 20.0, "rollout_steps": 8},
    "nft": AUTOMATIC
    | FALLING
    | {
        "policy_estimator": "nft",
        "nft_about": "old",
        "policy_loss_weight": 30.0,
        "kl_weight": 0.01,
        "negative_advantages": "drop",  # if kept, the policy leaves the data within 30 steps
    },
    "chance": MATCHING | {"reward_functions": ["automatic_rewards:chance"]},
}
PAIRS = {
    "flawed": {"train_json_path": "unscored.json"},
    "truth": {"train_json_path": "triplets.json", "reward_functions": []},
}


def chance(inputs: RewardInputs) -> jax.Array:
    """Compute a pseudo-random reward in [0, 1], [B]: the last digits of an image's sum.

    It differs between images but does not depend on their quality.
    """
    total = 1e3 * inputs.image.sum((1, 2, 3))
    return total - jnp.floor(total)


@dataclass(frozen=True)
class Experiment:
    """Settings of the experiment."""

    root: Path = Path("output/automatic")  # folder of all runs, cells and figures
    demo: Path = Path("output/demo")  # the demo's folder; it is made if it does not exist
    config: Path = Path("configs/tiny_auto.toml")  # configuration of every training; the method sets its own flags
    pairs: str = "flawed"  # flawed or truth
    methods: tuple[str, ...] = tuple(METHODS)  # trainings to compare
    seeds: tuple[int, ...] = (0, 1, 2)  # training seeds
    steps: int = 96  # training steps of GRPO
    points: int = 6  # number of checkpoints at which a training is measured
    held_out: int = 64  # number of held-out scenes to measure on
    first_scene: int = FIRST_HELD_OUT_SCENE + 40_000  # number of the first of them
    num_inference_steps: int = 12  # Euler steps of a removal
    settings: tuple[str, ...] = ()  # name=value (a TOML value) for all trainings, to tune them

    def cell_file(self, method: str, seed: int) -> Path:
        """Return the file with the measurements of one training."""
        return self.root / "cells" / f"{self.pairs}-{method}-{seed}.json"

    def run_dir(self, method: str, seed: int) -> Path:
        """Return the output folder of one training."""
        return self.root / "runs" / f"{self.pairs}-{method}-{seed}"


def training_config(experiment: Experiment, paths: DemoPaths, method: str, seed: int, steps: int) -> TrainConfig:
    """Return the configuration of one training: the experiment's file, the flags of the method, and the paths."""
    settings = load_toml(experiment.config) | {
        "val_json_path": str(paths.held_out / "triplets.json"),
        "output_dir": str(experiment.run_dir(method, seed)),
        "overwrite_output_dir": True,
        "pretrained_model_name_or_path": str(paths.fill),
        "pretrained_redux_model_name_or_path": str(paths.redux),
        "max_train_steps": steps,
        "validation_steps": 0,
        "checkpointing_steps": max(1, steps // experiment.points),
        "checkpoints_total_limit": 0,
        "report_to": ["none"],
        "log_freq": max(1, steps // (2 * experiment.points)),
        "seed": seed,
    }
    if method == "contrast_chance":
        state = read_state(find_checkpoint(experiment.run_dir("contrast", seed) / "checkpoints"))
        settings["policy_strength"] = float(state["strength.strength"])
    settings |= PAIRS[experiment.pairs]
    settings["train_json_path"] = str(paths.train / settings["train_json_path"])
    user_settings = tomllib.loads("\n".join(experiment.settings))
    return from_flat_dict(settings | METHODS[method] | user_settings)


@dataclass(frozen=True, kw_only=True)
class Evaluation(HeldOutScenes):
    """The held-out scenes of an experiment, with its settings and the folders of its base.

    decoded_truth: the scenes' ground truth, encoded and decoded by the base's VAE, [S, h, w, 3].
    """

    experiment: Experiment
    paths: DemoPaths
    decoded_truth: np.ndarray

    @classmethod
    def prepare(cls, experiment: Experiment) -> "Evaluation":
        """Draw the scenes; make the demo's data and base if they do not exist yet."""
        paths = prepare(experiment.demo, DemoSettings())
        scenes = make_scenes(experiment.first_scene, experiment.held_out)
        decoded_truth = decode_encoded_truth(paths.fill, paths.redux, experiment.config, scenes)
        return cls(
            fill=paths.fill,
            redux=paths.redux,
            config=experiment.config,
            scenes=scenes,
            num_inference_steps=experiment.num_inference_steps,
            experiment=experiment,
            paths=paths,
            decoded_truth=decoded_truth,
        )

    def measure(self, images: np.ndarray) -> dict[str, list]:
        """Measure images [S, h, w, 3].

        Returns:
            as nested lists: scores [S, 3] in [0, 1], psnr [S] in dB, defects [S, 4] (signed strengths).
        """
        measured = measure_rewards(images, self.scenes, self.decoded_truth)
        measured["defects"] = measure_defects(images, self.scenes)
        return {name: values.tolist() for name, values in measured.items()}


def count_evaluations(config: TrainConfig, steps: int) -> float:
    """Count the network evaluations of single images in `steps` training steps.

    A forward pass counts 1; a pass with its gradient counts 3.
    """
    conditions, rollouts = config.run.train_batch_size, config.rollouts
    base_loss = 3.0 * conditions * config.updates * steps
    if config.mode != "automatic":
        return base_loss
    timesteps = rollouts.sde_window if config.grpo.policy_estimator == "sde" else config.grpo.num_policy_timesteps
    updates = rollouts.num_iterations * timesteps * (3.0 + (config.grpo.kl_weight > 0))
    rollout = rollouts.rollout_steps + updates + timesteps * (config.grpo.estimator == "contrast")  # its reference
    return base_loss + sum(map(rollouts.due, range(steps))) * conditions * rollouts.num_generations * rollout


def run(experiment: Experiment) -> None:
    """Train and measure every cell that does not exist yet.

    Standard training comes last, because its number of steps follows from the time that `matching` took.
    """
    jax.config.update("jax_compilation_cache_dir", str((experiment.root / "compiled").resolve()))
    evaluation = Evaluation.prepare(experiment)
    limits = experiment.cell_file("limits", 0)
    if not limits.exists():
        images = {"base": evaluation.generate(None), "roundtrip": evaluation.decoded_truth}
        write_json(limits, {name: evaluation.measure(x) for name, x in images.items()})
    for seed in experiment.seeds:
        for method in sorted(experiment.methods, key=lambda name: name == "standard"):
            if not experiment.cell_file(method, seed).exists():
                run_cell(evaluation, method, seed)


def run_cell(evaluation: Evaluation, method: str, seed: int) -> None:
    """Train, measure the held-out removals of every checkpoint, and write the cell.

    Standard training gets as many steps as fit into the time of `matching`. A probe run of `PROBE_STEPS` steps measures
    the median time of its steps.

    Raises:
        SystemExit: the method is `standard`, and `matching` has no cell for this seed.
    """
    experiment, paths = evaluation.experiment, evaluation.paths
    steps = experiment.steps
    if method == "standard":
        matching_file = experiment.cell_file("matching", seed)
        if not matching_file.exists():
            sys.exit(
                f"{matching_file}: not found; standard training takes as long as matching, so add matching to --methods"
            )
        matching = json.loads(matching_file.read_text())
        probe = training_config(experiment, paths, method, seed, PROBE_STEPS)
        probe = replace(probe, run=replace(probe.run, output_dir=f"{probe.run.output_dir}-probe"))
        rows = read_rows(train(probe) / "metrics.jsonl")[1:]
        steps = round(matching["points"][-1]["seconds"] / float(np.median([row["step_time"] for row in rows])))
        steps -= steps % (2 * experiment.points)  # The last step has a row of metrics and a checkpoint.
    config = training_config(experiment, paths, method, seed, steps)
    output, points = Path(config.run.output_dir), []
    if not (output / "checkpoints" / str(steps)).exists():
        train(config)
    rows = read_rows(output / "metrics.jsonl")
    for checkpoint in sorted((output / "checkpoints").iterdir(), key=lambda path: int(path.name)):
        step = int(checkpoint.name)
        row = [row for row in rows if row["step"] <= step][-1]
        points.append(
            {
                "step": step,
                "seconds": seconds_until(config, step),
                "evaluations": count_evaluations(config, step),
                "drift": {name: row.get(name) for name in ("velocity_norm_ratio", "kl_to_base", "base_loss")},
                **evaluation.measure(evaluation.generate(checkpoint)),
            }
        )
    means = {
        name: float(np.mean([r[name] for r in rows if name in r]))
        for name in ("mean_ratio", "clip_fraction_at_sync")
        if name in rows[-1]
    }
    write_json(experiment.cell_file(method, seed), {"settings": to_flat_dict(config), "points": points, **means})
    last = points[-1]
    rewards = [round(float(total_reward(np.asarray(point["scores"]), WEIGHTS).mean()), 3) for point in points]
    psnr = [round(float(np.mean(point["psnr"])), 2) for point in points]
    print(
        f"{method}, seed {seed}: {steps} steps, {last['seconds']:.0f} s, rewards {rewards}, PSNR {psnr}; at the end "
        f"scores {np.mean(last['scores'], 0).round(3)}, defects {np.mean(last['defects'], 0).round(2)}, "
        f"{last['drift']}, {means}",
        flush=True,
    )


def seconds_until(config: TrainConfig, step: int) -> float:
    """Return the training time up to a step in seconds, from the mean step time in each row of metrics.

    The first row includes compilation. Its steps count with the mean of the other rows.
    """
    rows = [row for row in read_rows(Path(config.run.output_dir) / "metrics.jsonl") if row["step"] <= step]
    seconds, last_step = 0.0, rows[0]["step"]
    for row in rows[1:]:
        seconds += row["step_time"] * (row["step"] - last_step)
        last_step = row["step"]
    return seconds * last_step / (last_step - rows[0]["step"])


def load_cells(experiment: Experiment) -> dict[str, dict]:
    """Read the cells, by method.

    Returns:
        for each method with cells:
            reward, psnr: [seeds, points, scenes].
            scores: [seeds, points, scenes, 3].
            step, seconds, evaluations: [seeds, points], the cost up to each point.
            velocity_norm_ratio, kl_to_base: drift at the last point, mean over the seeds; NaN if not measured.
            contents: the contents of the cells' files.
    """
    cells = {}
    for method in METHODS:
        files = [experiment.cell_file(method, seed) for seed in experiment.seeds]
        contents = [json.loads(file.read_text()) for file in files if file.exists()]
        if not contents:
            continue

        def stack_points(name: str, contents=contents) -> np.ndarray:
            return np.asarray([[point[name] for point in cell["points"]] for cell in contents])

        cells[method] = {name: stack_points(name) for name in ("step", "seconds", "evaluations", "scores", "psnr")}
        cells[method]["reward"] = total_reward(cells[method]["scores"], WEIGHTS)
        drift = [[point["drift"] for point in cell["points"]] for cell in contents]
        for name in ("velocity_norm_ratio", "kl_to_base"):
            measured = [row[-1][name] for row in drift if row[-1][name] is not None]
            cells[method][name] = float(np.mean(measured)) if measured else float("nan")
        cells[method]["contents"] = contents
    return cells


def table(experiment: Experiment) -> None:
    """Print final measurements, paired differences and costs of all trainings, and draw the figure."""
    cells = load_cells(experiment)
    limits = json.loads(experiment.cell_file("limits", 0).read_text())
    print(f"{experiment.held_out} held-out scenes\n")
    heads = ["training", "seeds", "steps", "seconds", "reward", *SCORES, "PSNR", "velocity_norm_ratio", "kl_to_base"]
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for name, title in (("base", "floor: the base"), ("roundtrip", "ceiling: the truth through the VAE")):
        scores = np.asarray(limits[name]["scores"])
        means = " | ".join(f"{value:.3f}" for value in (total_reward(scores, WEIGHTS).mean(), *scores.mean(0)))
        print(f"| {title} | | | | {means} | {np.mean(limits[name]['psnr']):.2f} | | |")
    for method, cell in cells.items():
        scores = cell["scores"][:, -1].mean((0, 1))
        means = " | ".join(f"{value:.3f}" for value in (cell["reward"][:, -1].mean(), *scores))
        costs = " | ".join(f"{cell[name][:, -1].mean():.0f}" for name in ("step", "seconds"))
        drift = " | ".join(f"{cell[name]:.3f}" for name in ("velocity_norm_ratio", "kl_to_base"))
        psnr = cell["psnr"][:, -1].mean()
        print(f"| {method} | {len(cell['contents'])} | {costs} | {means} | {psnr:.2f} | {drift} |")
    for opponent, title in (("standard", "standard training"), ("chance", "chance")):
        print_differences(cells, opponent, title)
    print_evaluations(cells)
    print(f"\nfigure: {draw(experiment, cells)}")


def print_differences(cells: dict[str, dict], opponent: str, title: str) -> None:
    """Print every other training minus this one at the last point, paired over seeds and scenes."""
    if opponent not in cells:
        return
    print(f"\n| minus {title} | reward [95 %] | PSNR [95 %] |\n| --- | --- | --- |")
    for method in (name for name in cells if name not in ("standard", opponent)):
        columns = []
        for name in ("reward", "psnr"):
            difference = cells[method][name][:, -1] - cells[opponent][name][:, -1]
            low, high = bootstrap_interval(difference)
            columns.append(f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
        print(f"| {method} | {columns[0]} | {columns[1]} |")


def print_evaluations(cells: dict[str, dict]) -> None:
    """Print the network evaluations and seconds that each estimator needs to reach the final reward of `sde`.

    Costs between two points are interpolated linearly in the reward.
    """
    if "sde" not in cells:
        return
    goal = cells["sde"]["reward"][:, -1].mean()
    sde_costs = {name: cells["sde"][name][:, -1].mean() for name in ("evaluations", "seconds")}
    print(f"\nCost of reaching sde's final reward, {goal:.3f}, and its share of sde's total cost:\n")
    print("| estimator | evaluations | seconds | share of evaluations | share of seconds |\n" + "| --- " * 5 + "|")
    for method in ("contrast", "matching", "sde", "nft"):
        if method not in cells:
            continue
        rewards = cells[method]["reward"].mean((0, 2))
        reached = np.flatnonzero(rewards >= goal)
        if not len(reached):
            print(f"| {method} | not reached: {rewards.max():.3f} at most | | | |")
            continue
        costs = {}
        for name in sde_costs:
            at_points = cells[method][name].mean(0)
            after, before = reached[0], reached[0] - 1
            if before < 0:
                costs[name] = at_points[0]
            else:
                share = (goal - rewards[before]) / (rewards[after] - rewards[before])
                costs[name] = at_points[before] + share * (at_points[after] - at_points[before])
        print(
            f"| {method} | {costs['evaluations']:.0f} | {costs['seconds']:.0f} | "
            f"{costs['evaluations'] / sde_costs['evaluations']:.2f} | {costs['seconds'] / sde_costs['seconds']:.2f} |"
        )


def draw(experiment: Experiment, cells: dict[str, dict]) -> Path:
    """Plot the reward against network evaluations and against time, for each seed and as the mean of the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.4), sharey=True)
    for axis, name, label in zip(
        axes, ("evaluations", "seconds"), ("network evaluations of an image", "seconds of training"), strict=True
    ):
        for i, (method, cell) in enumerate(cells.items()):
            rewards = cell["reward"].mean(2)
            axis.plot(cell[name].mean(0), rewards.mean(0), color=f"C{i}", marker=".", label=method)
            for seed in range(len(rewards)):
                axis.plot(cell[name][seed], rewards[seed], color=f"C{i}", alpha=0.25, linewidth=0.8)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean total reward, held-out scenes")
    axes[0].set_xscale("log")
    axes[0].legend(loc="center left", fontsize=8)
    return save_figure(figure, experiment.root / f"{experiment.pairs}.png")


if __name__ == "__main__":
    run_commands({"run": run, "table": table})
