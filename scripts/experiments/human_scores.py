"""Compare what human-scored GRPO and imitation learn from the same scores ("Human-scored GRPO" in docs/results.md).

    python scripts/experiments/human_scores.py run                          trains and measures every cell
    python scripts/experiments/human_scores.py measure --first_scene 150000 measures the cells again, on other scenes
    python scripts/experiments/human_scores.py table                        prints tables, draws contact sheets
    python scripts/experiments/human_scores.py curve --steps 240            trains longer, measures ten checkpoints

All files are below --root (output/learning). There are two synthetic data sets: in one, one candidate in five is clean;
in the other, none is. Each has its own tiny base, which is trained on all candidates with equal weights. The following
trainings start from each base, with the same data, number of steps and seeds:

    standard          no scores
    score             base loss weighted by the scores
    softmax           base loss weighted by a softmax over the rewards of a group
    best              base loss on the best result of each group
    grpo              human-scored GRPO by the estimator matching, whose loss has no fixed point, for few steps
    contrast          human-scored GRPO with the default settings
    clean             ceiling: trained on the ground truth alone
    best_equal_time   `best` with as many steps as fit into the wall time of `grpo`

A cell is one training (data set, method, seed) and the file of its measurements. Each trained model removes the objects
of held-out scenes. The images are compared with the ground truth.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from held_out import (
    HeldOutScenes,
    bootstrap_interval,
    make_scenes,
    measure_removals,
    run_commands,
)

from ra_jax.config.parse import from_flat_dict, load_toml, to_flat_dict, to_present_names
from ra_jax.config.settings import DEFAULT_REWARD_WEIGHTS as REWARD_WEIGHTS
from ra_jax.config.settings import TrainConfig
from ra_jax.data.synthetic import DEFECTS, MIXES, quantize
from ra_jax.demo.prepare import FIRST_HELD_OUT_SCENE, DemoPaths, DemoSettings, prepare
from ra_jax.outputs import write_file
from ra_jax.reporting.contact_sheet import contact_sheet
from ra_jax.reporting.trackers import read_rows
from ra_jax.rewards.registry import total_reward
from ra_jax.training.loop import train
from ra_jax.training.setup import set_up

# Flags of trainings with and without scores.
SCORED = {"use_grpo": True, "use_human_scores": True, "enable_grpo_rewards": True}
UNSCORED = dict.fromkeys(SCORED, False) | {
    "enable_grpo_loss": False,
    "base_loss_weighting": "none",
    "policy_estimator": "auto",
}
METHODS = {  # in the order in which they are trained
    "standard": UNSCORED,
    "score": SCORED | {"enable_grpo_loss": False, "base_loss_weighting": "score"},
    "softmax": SCORED | {"enable_grpo_loss": False, "base_loss_weighting": "softmax"},
    "best": SCORED | {"enable_grpo_loss": False, "base_loss_weighting": "best"},
    "grpo": SCORED
    | {
        "enable_grpo_loss": True,
        "policy_estimator": "matching",
        "policy_temperature": 0.2,
        "policy_loss_weight": 2.0,
        "base_loss_weighting": "best",
    },
    "contrast": SCORED | {"enable_grpo_loss": True},
    "best_equal_time": SCORED | {"enable_grpo_loss": False, "base_loss_weighting": "best"},
    "clean": UNSCORED,
}
TITLES = {  # of rows in the table
    "base": "floor: the base",
    "standard": "standard",
    "score": "score-weighted base loss",
    "softmax": "softmax(R/0.05)-weighted",
    "best": "best-of-group",
    "best_equal_time": "best-of-group, GRPO's wall time",
    "grpo": "human-scored GRPO",
    "contrast": "the same with the estimator contrast",
    "clean": "ceiling: trained on the truth",
    "roundtrip": "ceiling: VAE round trip of the truth",
}


@dataclass(frozen=True)
class Experiment:
    """Settings of the experiment."""

    root: Path = Path("output/learning")  # folder of all data, runs, cells and sheets
    config: Path = Path("configs/tiny.toml")  # configuration of every training; the method sets its own flags
    mixes: tuple[str, ...] = MIXES  # mixes of candidates, a data set and a base for each
    methods: tuple[str, ...] = tuple(METHODS)  # trainings to compare
    seeds: tuple[int, ...] = (0, 1, 2)  # training seeds
    vae_steps: int = 900  # training steps of a base's VAE
    base_steps: int = 2000  # training steps of a base's transformer
    steps: int = 40  # training steps of every method but best_equal_time
    held_out: int = 128  # number of held-out scenes to measure on
    first_scene: int = FIRST_HELD_OUT_SCENE + 20_000  # number of the first of them; none was used to choose settings
    num_inference_steps: int = 12  # Euler steps of a removal

    def demo_settings(self, mix: str) -> DemoSettings:
        """Return the settings of the base that is trained on this mix of candidates."""
        return DemoSettings(mix=mix, vae_steps=self.vae_steps, base_steps=self.base_steps)

    def scene_settings(self) -> dict[str, int]:
        """Return the settings that cells must share to be compared scene by scene."""
        return {name: getattr(self, name) for name in ("first_scene", "held_out", "num_inference_steps")}

    def run_dir(self, mix: str, method: str, seed: int) -> Path:
        """Return the output folder of one training."""
        return self.root / "runs" / f"{mix}-{method}-{seed}"

    def cell_file(self, mix: str, method: str, seed: int) -> Path:
        """Return the file with the measurements of one training."""
        return self.root / "cells" / f"{mix}-{method}-{seed}.json"


@dataclass(frozen=True, kw_only=True)
class Evaluation(HeldOutScenes):
    """The held-out scenes of an experiment, with its settings and the folders of its base."""

    experiment: Experiment
    paths: DemoPaths

    @classmethod
    def prepare(cls, experiment: Experiment, mix: str) -> "Evaluation":
        """Draw the scenes; make the data and the base of a mix if they do not exist yet."""
        paths = prepare(experiment.root / mix, experiment.demo_settings(mix))
        return cls(
            fill=paths.fill,
            redux=paths.redux,
            config=experiment.config,
            scenes=make_scenes(experiment.first_scene, experiment.held_out),
            num_inference_steps=experiment.num_inference_steps,
            experiment=experiment,
            paths=paths,
        )


def run(experiment: Experiment) -> None:
    """Train and measure every cell that does not exist yet."""
    jax.config.update("jax_compilation_cache_dir", str((experiment.root / "compiled").resolve()))
    for mix in experiment.mixes:
        evaluation = Evaluation.prepare(experiment, mix)
        paths = evaluation.paths
        if not experiment.cell_file(mix, "base", 0).exists():
            measure_limits(evaluation, mix)
        for seed in experiment.seeds:
            for method in (name for name in METHODS if name in experiment.methods):
                steps = experiment.steps
                if method == "best_equal_time":
                    steps = round(steps * wall_time_ratio(experiment, paths, mix))
                output = experiment.run_dir(mix, method, seed)
                config = training_config(experiment, paths, method, output, steps=steps, seed=seed)
                run_cell(config, evaluation, experiment.cell_file(mix, method, seed))


def run_cell(config: TrainConfig, evaluation: Evaluation, cell: Path) -> None:
    """Train from the base, measure the held-out removals and write the cell; do nothing if the cell exists.

    Raises:
        SystemExit: the cell exists, and is of a training with other settings or was measured on other scenes.
    """
    settings = json.loads(json.dumps(to_flat_dict(config)))
    if cell.exists():
        saved = to_present_names(read_cell(evaluation.experiment, cell)["settings"])
        changed = {name: (saved.get(name), value) for name, value in settings.items() if saved.get(name) != value}
        if changed:
            raise SystemExit(f"{cell}: other settings, as name: (in the file, now) {changed}; give another --root")
        return
    output = Path(config.run.output_dir)
    train(config)
    rows = read_rows(output / "metrics.jsonl")
    metadata = {
        "settings": settings,
        "steps": config.run.max_train_steps,
        "velocity_norm_ratio": rows[-1].get("velocity_norm_ratio"),
        "clip_fraction_at_sync": [row["clip_fraction_at_sync"] for row in rows if "clip_fraction_at_sync" in row],
        "mean_ratio": float(np.mean([row["mean_ratio"] for row in rows[1:]])) if "mean_ratio" in rows[-1] else None,
    }
    measure_run(evaluation, output, cell, metadata)


def training_config(
    experiment: Experiment, paths: DemoPaths, method: str, output: Path, *, steps: int, seed: int
) -> TrainConfig:
    """Return the configuration of one training: the experiment's file, the flags of the method, and the paths."""
    file = "triplets.json" if method == "clean" else "labeled_dict.json"
    settings = load_toml(experiment.config) | {
        "train_json_path": str(paths.train / file),
        "val_json_path": str(paths.held_out / "triplets.json"),
        "output_dir": str(output),
        "overwrite_output_dir": True,
        "pretrained_model_name_or_path": str(paths.fill),
        "pretrained_redux_model_name_or_path": str(paths.redux),
        "max_train_steps": steps,
        "validation_steps": 0,
        "checkpointing_steps": 0,
        "report_to": ["none"],
        "log_freq": 8,
        "seed": seed,
    }
    return from_flat_dict(settings | METHODS[method])


def wall_time_ratio(experiment: Experiment, paths: DemoPaths, mix: str, steps: int = 12) -> float:
    """Return the time of a GRPO step divided by the time of a best-of-group step, both medians over `steps` steps.

    The two trainings take turns, step by step. If they ran one after the other, a change in the machine's load would
    change the ratio. The result is stored and used for all seeds of a data set.
    """
    file = experiment.root / "cells" / f"{mix}-time.json"
    if file.exists():
        return json.loads(file.read_text())["grpo"] / json.loads(file.read_text())["best"]
    seconds: dict[str, list[float]] = {"grpo": [], "best": []}
    runs = {}
    for name in seconds:
        output = experiment.root / "runs" / f"{mix}-time-{name}"
        setup = set_up(training_config(experiment, paths, name, output, steps=steps, seed=0))
        runs[name] = [setup, setup.compiled_steps(), setup.state, setup.batches()]
    for _ in range(steps):
        for name, (setup, step, state, batches) in runs.items():
            batch = next(batches)
            start = time.perf_counter()
            runs[name][2], _ = jax.block_until_ready(step(state, setup.frozen, batch))
            seconds[name].append(time.perf_counter() - start)
    # The first steps include compilation.
    medians = {name: float(np.median(values[2:])) for name, values in seconds.items()}
    file.write_text(json.dumps(medians))
    return medians["grpo"] / medians["best"]


def measure_limits(evaluation: Evaluation, mix: str) -> None:
    """Write the cells of the floor (the base alone) and of a ceiling (the ground truth encoded and decoded)."""
    for name, images in {"base": evaluation.generate(None), "roundtrip": evaluation.decode_encoded_truth()}.items():
        cell = evaluation.experiment.cell_file(mix, name, 0)
        write_cell(evaluation.experiment, cell, measure_removals(images, evaluation.scenes), {})


def measure_run(evaluation: Evaluation, output: Path, cell: Path, metadata: dict) -> None:
    """Generate removals with a run's experts, save the first eight for the contact sheet, and write the cell.

    Args:
        evaluation: the scenes and the base.
        output: the run's output folder.
        cell: the file to write.
        metadata: JSON values about the training, which the file holds in addition to the measurements.
    """
    images = evaluation.generate(output)
    np.savez_compressed(output / "generated.npz", images=quantize(images[:8]))
    write_cell(evaluation.experiment, cell, measure_removals(images, evaluation.scenes), metadata)


def measure_again(experiment: Experiment) -> None:
    """Measure every existing cell again, on the scenes of `--first_scene`."""
    for mix in experiment.mixes:
        evaluation = Evaluation.prepare(experiment, mix)
        measure_limits(evaluation, mix)
        for method in METHODS:
            for seed in experiment.seeds:
                cell = experiment.cell_file(mix, method, seed)
                if cell.exists():
                    measured = ("scores", "defects", "psnr_inside")
                    metadata = {k: v for k, v in json.loads(cell.read_text()).items() if k not in measured}
                    measure_run(evaluation, experiment.run_dir(mix, method, seed), cell, metadata)


def curve(experiment: Experiment) -> None:
    """Train with the first of `--seeds`, and print measurements at every tenth of `--steps`."""
    jax.config.update("jax_compilation_cache_dir", str((experiment.root / "compiled").resolve()))
    for mix in experiment.mixes:
        evaluation = Evaluation.prepare(experiment, mix)
        for method in experiment.methods:
            output = experiment.root / "curves" / f"{mix}-{method}"
            config = training_config(
                experiment, evaluation.paths, method, output, steps=experiment.steps, seed=experiment.seeds[0]
            )
            interval = max(1, experiment.steps // 10)
            intervals = {"checkpointing_steps": interval, "checkpoints_total_limit": 0, "log_freq": interval}
            train(from_flat_dict(to_flat_dict(config) | intervals))
            print(f"\n{mix}, {TITLES[method]}, {experiment.held_out} held-out scenes\n")
            print("| step | reward | mean \\|defect\\| | PSNR in mask | base loss | gradient norm |")
            print("| --- " * 6 + "|")
            for row in read_rows(output / "metrics.jsonl"):
                if row["step"] % interval == 0:
                    images = evaluation.generate(output / "checkpoints" / str(row["step"]))
                    measured = measure_removals(images, evaluation.scenes)
                    reward = total_reward(measured["scores"], REWARD_WEIGHTS).mean()
                    print(
                        f"| {row['step']} | {reward:.3f} | {np.abs(measured['defects']).mean():.3f} | "
                        f"{measured['psnr_inside'].mean():.2f} | {row['base_loss']:.3f} | {row['grad_norm']:.3f} |",
                        flush=True,
                    )


def write_cell(experiment: Experiment, path: Path, measured: dict, metadata: dict) -> None:
    """Write a cell's file and print the means. The file appears only when it is complete.

    Args:
        experiment: its settings of the scenes are written too.
        path: the cell's file.
        measured: the result of `measure_removals`.
        metadata: JSON values about the training.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {name: np.round(values, 4).tolist() for name, values in measured.items()}
    write_file(path, json.dumps(metadata | experiment.scene_settings() | rounded))
    print(path.stem, {name: np.round(np.mean(values, 0), 3).tolist() for name, values in measured.items()}, flush=True)


def read_cell(experiment: Experiment, path: Path) -> dict:
    """Read a cell's file.

    Raises:
        SystemExit: it was measured on other scenes than this experiment's.
    """
    contents, expected = json.loads(path.read_text()), experiment.scene_settings()
    actual = {name: contents.get(name) for name in expected}
    if actual != expected:
        raise SystemExit(
            f"{path}: measured with {actual}, expected {expected}; run the command `measure`, or give another --root"
        )
    return contents


def load_cells(experiment: Experiment, mix: str) -> dict[str, dict[str, np.ndarray]]:
    """Read the cells of a mix, by method.

    Returns:
        for each method with cells:
            reward, mean_abs, psnr: [seeds, scenes]; mean_abs is the mean of |defect| over the four defects.
            defects: [seeds, scenes, 4].
            contents: the contents of the cells' files.
            seeds: the training seeds.
    """
    cells = {}
    for method in TITLES:
        files = {seed: experiment.cell_file(mix, method, seed) for seed in experiment.seeds}
        seeds = [seed for seed, file in files.items() if file.exists()]
        contents = [read_cell(experiment, files[seed]) for seed in seeds]
        if not contents:
            continue
        defects = np.asarray([cell["defects"] for cell in contents])
        cells[method] = {
            "reward": np.asarray([total_reward(np.asarray(cell["scores"]), REWARD_WEIGHTS) for cell in contents]),
            "defects": defects,
            "mean_abs": np.abs(defects).mean(-1),
            "psnr": np.asarray([cell["psnr_inside"] for cell in contents]),
            "contents": contents,
            "seeds": seeds,
        }
    return cells


def table(experiment: Experiment) -> None:
    """For each data set, print a table and the paired differences to GRPO, and draw a contact sheet."""
    for mix in experiment.mixes:
        cells = load_cells(experiment, mix)
        print(f"\n### {mix}, {experiment.held_out} held-out scenes\n")
        print("| training | seeds | steps | reward | mean \\|defect\\| | " + " | ".join(DEFECTS) + " | PSNR in mask |")
        print("| --- " * (6 + len(DEFECTS)) + "|")
        for method, cell in cells.items():
            contents = cell["contents"]
            steps = f"{np.mean([c['steps'] for c in contents]):.0f}" if "steps" in contents[0] else ""
            signed = " | ".join(f"{value:+.3f}" for value in cell["defects"].mean((0, 1)))
            print(
                f"| {TITLES[method]} | {len(contents)} | {steps} | {cell['reward'].mean():.3f} | "
                f"{cell['mean_abs'].mean():.3f} | {signed} | {cell['psnr'].mean():.2f} |"
            )
        if "grpo" in cells:
            print_differences(cells)
            draw_sheet(experiment, mix)


def print_differences(cells: dict) -> None:
    """Print GRPO minus each other training, paired by scene and seed, with 95 % bootstrap intervals."""
    grpo = cells["grpo"]
    print("\n| GRPO minus | reward [95 %] | mean \\|defect\\| [95 %] | ratio of mean \\|defect\\| |")
    print("| --- | --- | --- | --- |")
    for method in ("standard", "score", "softmax", "best", "best_equal_time"):
        if method not in cells or cells[method]["seeds"] != grpo["seeds"]:
            continue  # cannot be paired: seeds are missing
        other, columns = cells[method], []
        for key in ("reward", "mean_abs"):
            difference = grpo[key] - other[key]
            low, high = bootstrap_interval(difference)
            columns.append(f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
        ratio = grpo["mean_abs"].mean() / other["mean_abs"].mean()
        print(f"| {TITLES[method]} | {columns[0]} | {columns[1]} | {ratio:.2f} |")
    clip = np.mean([np.mean(cell["clip_fraction_at_sync"]) for cell in grpo["contents"]])
    ratio = np.mean([cell["mean_ratio"] for cell in grpo["contents"]])
    # Short runs do not measure drift; their ratio is NaN.
    drift = np.mean(np.asarray([cell["velocity_norm_ratio"] for cell in grpo["contents"]], float))
    print(f"\nGRPO: clip_fraction before a sync {clip:.3f}, mean_ratio {ratio:.4f}, velocity_norm_ratio {drift:.3f}")


def draw_sheet(experiment: Experiment, mix: str) -> None:
    """Draw the contact sheet of a mix: a row for each of up to eight scenes, with source, truth and removals.

    The removals are those of each training with the first of `--seeds`.
    """
    scenes = make_scenes(experiment.first_scene, min(8, experiment.held_out))
    columns = [quantize(panel) for panel in (scenes.source, scenes.truth)]
    for method in METHODS:
        file = experiment.run_dir(mix, method, experiment.seeds[0]) / "generated.npz"
        if file.exists():
            columns.append(np.load(file)["images"])
    path = experiment.root / f"{mix}.png"
    contact_sheet(list(zip(*columns, strict=True))).save(path)
    print(f"contact sheet (source, truth, {', '.join(METHODS)}): {path}")


if __name__ == "__main__":
    run_commands({"run": run, "measure": measure_again, "table": table, "curve": curve})
