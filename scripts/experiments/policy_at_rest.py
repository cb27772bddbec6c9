"""Long runs of human-scored GRPO: do they come to rest, where, and what do they win ("A policy that comes to rest" in
docs/results.md).

    python scripts/experiments/policy_at_rest.py run                       trains and measures every cell (hours)
    python scripts/experiments/policy_at_rest.py run --cells contrast      some of them
    python scripts/experiments/policy_at_rest.py table                     prints the tables and draws the figures

Every cell is the command of the user's guide on the scenes of the demo, with its own flags word for word. The flags
added are the base, the panel size, the prompt length, the rank and the precision of the tiny model. A cell changes what
its name says:

    contrast        nothing
    contrast_10x    ten times the learning rate
    contrast_best   --base_loss_weighting best
    matching        the loss of before: the estimator matching with a fixed temperature
    best_of_group   no policy: the base loss on the best result of each scene
    strength_0.25 … strength_4    the strength that `auto` chooses, times this factor; fewer steps
    single          one result per photo, as in the guide's own example
    single_score    the same without a policy: the base loss weighted by the scores

Checkpoints are measured on scenes that were never used for any choice. Each scene's removal is scored by the rule that
scored the training data ("people"), and by the automatic rewards that compare with the ground truth ("truth").
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from held_out import (
    HeldOutScenes,
    bootstrap_interval,
    generate_removals,
    make_scenes,
    measure_removals,
    measure_rewards,
    print_heads,
    print_row,
    read_state,
    run_commands,
    save_figure,
    write_json,
)
from matplotlib import pyplot as plt

from ra_jax.checkpoints import find_checkpoint
from ra_jax.config.parse import from_flat_dict, to_flat_dict
from ra_jax.config.settings import DEFAULT_REWARD_WEIGHTS as WEIGHTS
from ra_jax.demo.prepare import FIRST_HELD_OUT_SCENE, DemoPaths
from ra_jax.reporting.trackers import read_rows
from ra_jax.rewards.registry import SCORES, total_reward
from ra_jax.training.dataset import load_run_data
from ra_jax.training.loop import train
from ra_jax.training.strength import table_of_scores

GUIDE = {  # the first command of the guide
    "use_grpo": True,
    "use_human_scores": True,
    "enable_grpo_rewards": True,
    "enable_grpo_loss": True,
    "score_format": "dict",
    "use_lora": True,
    "num_experts": 3,
    "removal_reward_weight": 0.4,
    "background_reward_weight": 0.3,
    "smoothness_reward_weight": 0.3,
    "base_loss_weight": 1.0,
    "policy_loss_weight": 0.1,
    "diversity_loss_weight": 0.05,
    "clip_range": 0.2,
    "train_batch_size": 4,
    "learning_rate": 1e-4,
    "max_train_steps": 10_000,
}
TINY = {"aspect_ratio_buckets": "32,32", "max_sequence_length": 4, "lora_rank": 8, "mixed_precision": "no"}
FACTORS = (0.25, 0.5, 2.0, 4.0)  # of the strength that `auto` chooses
CELLS = {
    "contrast": {},
    "contrast_10x": {"learning_rate": 1e-3},
    "contrast_best": {"base_loss_weighting": "best"},
    "matching": {"policy_estimator": "matching", "policy_temperature": 0.1},
    "best_of_group": {"enable_grpo_loss": False, "base_loss_weighting": "best"},
    **{f"strength_{factor:g}": {} for factor in FACTORS},
    "single": {},
    "single_score": {"enable_grpo_loss": False},
}


@dataclass(frozen=True)
class Experiment:
    """Settings of the experiment."""

    root: Path = Path("output/rest")  # folder of all runs, cells and figures
    demo: Path = Path("output/demo")  # the demo's folder, which `python -m ra_jax.demo` wrote
    cells: tuple[str, ...] = tuple(CELLS)  # cells to train, measure or show
    seeds: tuple[int, ...] = (0,)  # training seeds
    steps: int = 10_000  # training steps
    strength_steps: int = 3_000  # training steps of the cells strength_…
    every: int = 500  # steps between measured checkpoints
    held_out: int = 128  # number of scenes to measure on
    first_scene: int = FIRST_HELD_OUT_SCENE + 320_000  # number of the first of them
    num_inference_steps: int = 12  # Euler steps of a removal
    noise_seeds: int = 8  # removals of each scene, from different noise, for the spread

    @property
    def paths(self) -> DemoPaths:
        """The parts of the demo."""
        return DemoPaths(self.demo)

    def run_dir(self, cell: str, seed: int) -> Path:
        """Return the output folder of a cell's training."""
        return self.root / f"{cell}-{seed}"

    def cell_file(self, cell: str, seed: int) -> Path:
        """Return the file of a cell's measurements."""
        return self.root / "cells" / f"{cell}-{seed}.json"


@dataclass(frozen=True)
class Point:
    """Measurements of one checkpoint, one value for each scene.

    Attributes:
        people: total reward by the rule that scored the training data [S].
        scores: its three scores [S][3].
        truth: total reward by the automatic rewards that compare with the ground truth [S].
        psnr_inside: PSNR inside the mask in dB [S].
        defects: signed strengths of the four defects [S][4].
    """

    people: list
    scores: list
    truth: list
    psnr_inside: list
    defects: list
    step: int = field(default=-1)


def one_result_per_photo(experiment: Experiment) -> Path:
    """Write the demo's records with only one result of each photo, and return the path of the file."""
    folder = experiment.paths.train.resolve()
    by_photo: dict[str, list[dict]] = {}
    for record in json.loads((folder / "labeled_dict.json").read_text(encoding="utf-8")):
        paths = {name: str(folder / record[name]) for name in ("ref", "src", "mask", "result") if name in record}
        by_photo.setdefault(record["src"], []).append(record | paths)
    # The first candidate of the first photo, the second of the second, and so on: all are equally likely.
    kept = [records[i % len(records)] for i, records in enumerate(by_photo.values())]
    path = experiment.root / "single.json"
    write_json(path, kept)
    return path


def training_config(experiment: Experiment, cell: str, seed: int):
    """Return the configuration of a cell's training."""
    paths = experiment.paths
    data = paths.train / "labeled_dict.json" if not cell.startswith("single") else one_result_per_photo(experiment)
    settings = {
        "train_json_path": str(data),
        "output_dir": str(experiment.run_dir(cell, seed)),
        "pretrained_model_name_or_path": str(paths.fill),
        "pretrained_redux_model_name_or_path": str(paths.redux),
        "overwrite_output_dir": True,
        "checkpointing_steps": experiment.every,
        "validation_steps": experiment.every,
        "checkpoints_total_limit": 0,
        "report_to": ["none"],
        "seed": seed,
    }
    changes, steps = dict(CELLS[cell]), experiment.steps
    if cell.startswith("strength_"):
        steps = experiment.strength_steps
        chosen = json.loads(experiment.cell_file("contrast", seed).read_text(encoding="utf-8"))["strength"]
        changes["policy_strength"] = float(cell.removeprefix("strength_")) * chosen
    return from_flat_dict(GUIDE | TINY | settings | changes | {"max_train_steps": steps})


class Measurement:
    """Generates removals of the held-out scenes with the weights of checkpoints, and measures them."""

    def __init__(self, experiment: Experiment, config: Path):
        scenes, paths = make_scenes(experiment.first_scene, experiment.held_out), experiment.paths
        self._experiment, self._base, self.scenes = experiment, (paths.fill, paths.redux, config), scenes
        self._held_out = HeldOutScenes(
            fill=paths.fill,
            redux=paths.redux,
            config=config,
            scenes=scenes,
            num_inference_steps=experiment.num_inference_steps,
        )
        self._decoded_truth = self._held_out.decode_encoded_truth()

    def measure(self, checkpoint: Path | None) -> Point:
        """Measure a checkpoint; None: the base."""
        images = self._held_out.generate(checkpoint)
        measured = measure_removals(images, self.scenes)
        truth = measure_rewards(images, self.scenes, self._decoded_truth)["scores"]
        return Point(
            people=total_reward(measured["scores"], WEIGHTS).tolist(),
            scores=measured["scores"].tolist(),
            truth=total_reward(truth, WEIGHTS).tolist(),
            psnr_inside=measured["psnr_inside"].tolist(),
            defects=measured["defects"].tolist(),
            step=-1 if checkpoint is None else int(checkpoint.name),
        )

    def spread(self, checkpoint: Path | None, scenes: int = 32) -> dict[str, float]:
        """Measure how different removals of the same scene are that start from different noise.

        Returns:
            pixel_std: std of a pixel inside the mask over the removals, root mean square over pixels and scenes.
            reward_std: within-scene std of the total reward by the rule, root mean square over the scenes.
        """
        few = make_scenes(self._experiment.first_scene, scenes)
        images = [
            generate_removals(
                *self._base, few, checkpoint, num_inference_steps=self._experiment.num_inference_steps, seed=seed
            )
            for seed in range(self._experiment.noise_seeds)
        ]
        rewards = [total_reward(measure_removals(x, few)["scores"], WEIGHTS) for x in images]
        inside = few.mask[..., None].astype(np.float64)
        variance = (np.var(np.stack(images), axis=0) * inside).sum((1, 2, 3)) / (3 * inside.sum((1, 2, 3)))
        return {
            "pixel_std": float(np.sqrt(variance.mean())),
            "reward_std": float(np.sqrt(np.var(np.stack(rewards), axis=0).mean())),
        }


def run(experiment: Experiment) -> None:
    """Train and measure every cell that has no file yet, seed by seed."""
    for seed in experiment.seeds:
        for cell in experiment.cells:
            if not experiment.cell_file(cell, seed).exists():
                run_cell(experiment, cell, seed)


def run_cell(experiment: Experiment, cell: str, seed: int) -> None:
    """Train a cell, measure its checkpoints, and write its file."""
    config = training_config(experiment, cell, seed)
    output = Path(config.run.output_dir)
    if not (output / "checkpoints" / str(config.run.max_train_steps)).exists():
        train(config)
    uses_contrast = config.uses_policy and config.grpo.estimator == "contrast"
    measurement = Measurement(experiment, output / "config.toml")
    checkpoints = sorted((output / "checkpoints").iterdir(), key=lambda path: int(path.name))
    content = {
        "settings": to_flat_dict(config),
        "strength": float(read_state(checkpoints[-1])["strength.strength"]) if uses_contrast else None,
        "norm_of_b": {checkpoint.name: norm_of_b(checkpoint) for checkpoint in checkpoints},
        "points": [vars(measurement.measure(checkpoint)) for checkpoint in (None, *checkpoints)],
        "best": vars(measurement.measure(find_checkpoint(output / "best"))),
        "spread": {"base": measurement.spread(None), "end": measurement.spread(checkpoints[-1])},
        "rows": read_rows(output / "metrics.jsonl"),
    }
    write_json(experiment.cell_file(cell, seed), content)
    print(summarize(cell, seed, content), flush=True)


def norm_of_b(checkpoint: Path) -> float:
    """Return the norm of all matrices B of the experts, which are 0 at the start."""
    leaves = [x for name, x in read_state(checkpoint).items() if re.fullmatch(r"trainable\..*lora_b", name)]
    return float(np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in leaves)))


def mean_of(point: dict, name: str) -> float:
    """Return the mean of a measurement over the scenes."""
    return float(np.mean(point[name]))


def gain_ratio(base: dict, end: dict, best: dict, name: str) -> float:
    """Return the gain at the end divided by the gain of the best look; NaN if the best look is the base's."""
    gain, best_gain = (mean_of(point, name) - mean_of(base, name) for point in (end, best))
    return gain / best_gain if best_gain else float("nan")


def window(rows: list[dict], name: str, end: int, length: int) -> float:
    """Return the mean of a metric over the rows of the `length` steps that end at step `end`."""
    return float(np.mean([row[name] for row in rows if end - length < row["step"] <= end and name in row]))


def summarize(cell: str, seed: int, content: dict) -> str:
    """Return a line with the most important figures of a cell."""
    base, end, best = content["points"][0], content["points"][-1], content["best"]
    gains = []
    for name in ("people", "truth"):
        means, ratio = [mean_of(point, name) for point in (base, end)], gain_ratio(base, end, best, name)
        gains.append(f"{name} {means[0]:+.3f} -> {means[1]:+.3f}, {ratio:.2f} of the best look's gain")
    inside = f"PSNR in mask {mean_of(base, 'psnr_inside'):.2f} -> {mean_of(end, 'psnr_inside'):.2f}"
    return f"{cell}, seed {seed}: {'; '.join(gains)} (step {best['step']}); {inside}; spread {content['spread']}"


def load_cells(experiment: Experiment) -> dict[str, list[dict]]:
    """Read the files of the cells that exist, by cell."""
    cells = {}
    for cell in experiment.cells:
        files = [experiment.cell_file(cell, seed) for seed in experiment.seeds]
        contents = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        if contents:
            cells[cell] = contents
    return cells


def table(experiment: Experiment) -> None:
    """Print the tables of all cells, and draw the figures."""
    cells = load_cells(experiment)
    print_rest(cells)
    print_growth(cells)
    print_differences(cells)
    moved = movements(experiment, cells)
    print_strength(moved)
    print(f"\nfigures: {draw_curves(experiment, cells)} {draw_strength(experiment, moved)}")


def print_rest(cells: dict[str, list[dict]]) -> None:
    """Print where every cell starts, stands at step 500, at the best look and at the end."""
    heads = ("cell", "seed", "reward", "base", "step 500", "best look", "end", "end's gain / best's", "PSNR in mask")
    print_heads(heads)
    for cell, contents in cells.items():
        for content in contents:
            points = {point["step"]: point for point in content["points"]}
            base, end, best = content["points"][0], content["points"][-1], content["best"]
            for name in ("people", "truth"):
                early = f"{mean_of(points[500], name):+.3f}" if 500 in points else ""
                ratio = gain_ratio(base, end, best, name)
                psnr = f"{mean_of(base, 'psnr_inside'):.1f} → {mean_of(end, 'psnr_inside'):.1f}"
                columns = (cell, content["settings"]["seed"], name, f"{mean_of(base, name):+.3f}", early)
                columns += (f"{mean_of(best, name):+.3f} (step {best['step']})", f"{mean_of(end, name):+.3f}")
                print_row(*columns, f"{ratio:.2f}", psnr)


def print_growth(cells: dict[str, list[dict]]) -> None:
    """Print how much metrics grow over the second half of every run, as means over a tenth of its steps."""
    names = ("grad_norm", "base_loss", "kl_to_base", "reference_distance")
    heads = ("cell", "seed", *names, "‖B‖", "pixel std, end / base", "reward std, base", "reward std, end")
    print_heads(heads)
    for cell, contents in cells.items():
        for content in contents:
            rows, last = content["rows"], content["rows"][-1]["step"]
            columns = []
            for name in names:
                if name not in rows[-1]:
                    columns.append("")
                    continue
                half, whole = (window(rows, name, end, last // 10) for end in (last // 2, last))
                columns.append(f"{half:.3f} → {whole:.3f} ({whole / half:.2f})")
            norms = {int(step): norm for step, norm in content["norm_of_b"].items()}
            half, whole = norms[max(step for step in norms if step <= max(last // 2, min(norms)))], norms[last]
            columns.append(f"{half:.2f} → {whole:.2f} ({whole / half:.2f})")
            spread = content["spread"]
            columns.append(f"{spread['end']['pixel_std'] / spread['base']['pixel_std']:.2f}")
            columns += [f"{spread[name]['reward_std']:.3f}" for name in ("base", "end")]
            print_row(cell, content["settings"]["seed"], *columns)


def print_differences(cells: dict[str, list[dict]]) -> None:
    """Print contrast minus best-of-group at the end, paired over seeds and scenes."""
    if not {"contrast", "best_of_group"} <= cells.keys():
        return
    for name in ("people", "truth"):
        ends = [[content["points"][-1][name] for content in cells[cell]] for cell in ("contrast", "best_of_group")]
        count = min(map(len, ends))
        difference = np.asarray(ends[0][:count]) - np.asarray(ends[1][:count])
        low, high = bootstrap_interval(difference)
        print(f"\ncontrast minus best_of_group, {name}: {difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]")


def strengths(cells: dict[str, list[dict]]) -> list[tuple[float, dict, dict]]:
    """Return (factor, base, end) of every strength, in order. Contrast counts at the steps of the others."""
    found = []
    for cell, contents in cells.items():
        if cell.startswith("strength_"):
            points = contents[0]["points"]
            found.append((float(cell.removeprefix("strength_")), points[0], points[-1]))
    if found and "contrast" in cells:
        points, step = cells["contrast"][0]["points"], found[0][2]["step"]
        found.append((1.0, points[0], next(point for point in points if point["step"] == step)))
    return sorted(found, key=lambda entry: entry[0])


def movements(experiment: Experiment, cells: dict[str, list[dict]]) -> dict[float, dict[str, np.ndarray]]:
    """Return the predicted and the measured movement of every score [S], and the two gains, by strength / auto."""
    found = strengths(cells)
    if not found:
        return {}
    config = training_config(experiment, "contrast", experiment.seeds[0])
    table = table_of_scores(config, load_run_data(config))
    chosen = cells["contrast"][0]["strength"]
    return {
        factor: {
            "predicted": table.movements(factor * chosen),
            "measured": np.mean(end["scores"], 0) - np.mean(base["scores"], 0),
            "gains": np.asarray([mean_of(end, name) - mean_of(base, name) for name in ("people", "truth")]),
        }
        for factor, base, end in found
    }


def print_strength(found: dict[float, dict[str, np.ndarray]]) -> None:
    """Print the predicted and the measured movement of every score at every strength."""
    heads = ("strength / auto", *(f"{name}, predicted → measured" for name in SCORES), "gain, people", "gain, truth")
    print_heads(heads)
    for factor, moved in found.items():
        pairs = zip(moved["predicted"], moved["measured"], strict=True)
        columns = [f"{predicted:+.3f} → {measured:+.3f}" for predicted, measured in pairs]
        print_row(f"{factor:g}", *columns, *(f"{gain:+.3f}" for gain in moved["gains"]))


def draw_curves(experiment: Experiment, cells: dict[str, list[dict]]) -> Path:
    """Draw the reward of every long cell by step."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.4))
    shown = [cell for cell in cells if not cell.startswith(("strength_", "single"))]
    for axis, name, title in zip(axes, ("people", "truth"), ("as people score", "against the truth"), strict=True):
        for i, cell in enumerate(shown):
            for j, content in enumerate(cells[cell]):
                points = [(max(point["step"], 0), mean_of(point, name)) for point in content["points"]]
                axis.plot(*zip(*points, strict=True), color=f"C{i}", label=None if j else cell, linewidth=1.2)
        axis.set_title(f"mean total reward, {title}", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return save_figure(figure, experiment.root / "rest.png")


def draw_strength(experiment: Experiment, found: dict[float, dict[str, np.ndarray]]) -> Path | None:
    """Draw the measured against the predicted movement of every score, one point for each strength."""
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    predicted, measured = (np.stack([moved[name] for moved in found.values()]) for name in ("predicted", "measured"))
    for i, name in enumerate(SCORES):
        axis.plot(predicted[:, i], measured[:, i], marker="o", color=f"C{i}", label=name)
        for factor, x, y in zip(found, predicted[:, i], measured[:, i], strict=True):
            axis.annotate(f"×{factor:g}", (x, y), textcoords="offset points", xytext=(4, -9), fontsize=7)
    axis.set_xscale("log")
    axis.set_xlabel("predicted movement of the mean score")
    axis.set_ylabel("measured movement")
    axis.axhline(0.0, color="black", linewidth=0.6)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return save_figure(figure, experiment.root / "strength.png")


if __name__ == "__main__":
    run_commands({"run": run, "table": table})
