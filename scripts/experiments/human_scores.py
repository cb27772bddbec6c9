"""Does human-scored GRPO learn more from scores than imitation does? The experiment behind README's "Learning".

    python scripts/experiments/human_scores.py run   [--root output/learning]  trains and measures every cell
    python scripts/experiments/human_scores.py measure [--root output/learning]  measures them anew, on --first_scene
    python scripts/experiments/human_scores.py table [--root output/learning]  prints tables, draws contact sheets
    python scripts/experiments/human_scores.py curve --steps 240 [--methods grpo] trains longer, measures on the way

Two synthetic data sets (one candidate in five clean; none clean), one tiny base each, trained uniformly on all
candidates. From each base, with equal data, steps and seeds: standard training, three ways to weigh the base loss by
the scores, human-scored GRPO; a ceiling (trained on the truth only); and the best-of-group run again, as long as GRPO
takes by the clock. Each model then removes the objects of held-out scenes, and the pictures are measured.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from held_out import bootstrap_interval, decode_encoded_truth, generate_removals, make_scenes, measure_removals

from ra_jax.config.parse import from_flat_dict, load_toml, to_flat_dict
from ra_jax.config.settings import DEFAULT_REWARD_WEIGHTS as REWARD_WEIGHTS
from ra_jax.config.settings import TrainConfig
from ra_jax.data.synthetic import DEFECTS, MIXES, Scene, quantize
from ra_jax.demo.prepare import FIRST_HELD_OUT_SCENE, DemoPaths, DemoSettings, prepare
from ra_jax.outputs import write_file
from ra_jax.reporting.contact_sheet import contact_sheet
from ra_jax.reporting.trackers import read_rows
from ra_jax.rewards.registry import total_reward
from ra_jax.training.loop import train
from ra_jax.training.setup import set_up

SCORED = {"use_grpo": True, "use_human_scores": True, "enable_grpo_rewards": True}
UNSCORED = dict.fromkeys(SCORED, False) | {
    "enable_grpo_loss": False,
    "base_loss_weighting": "none",
    "policy_estimator": "matching",
}
METHODS = {
    "standard": UNSCORED,
    "score": SCORED | {"enable_grpo_loss": False, "base_loss_weighting": "score"},
    "softmax": SCORED | {"enable_grpo_loss": False, "base_loss_weighting": "softmax"},
    "best": SCORED | {"enable_grpo_loss": False, "base_loss_weighting": "best"},
    "grpo": SCORED | {"enable_grpo_loss": True},
    "best_equal_time": SCORED | {"enable_grpo_loss": False, "base_loss_weighting": "best"},
    "clean": UNSCORED,
}
TITLES = {
    "base": "floor: the base",
    "standard": "standard",
    "score": "score-weighted base loss",
    "softmax": "softmax(R/0.05)-weighted",
    "best": "best-of-group",
    "best_equal_time": "best-of-group, GRPO's wall time",
    "grpo": "human-scored GRPO",
    "clean": "ceiling: trained on the truth",
    "roundtrip": "ceiling: VAE round trip of the truth",
}


@dataclass(frozen=True)
class Experiment:
    """root: where everything goes; vae_steps, base_steps: of the bases; steps: of every training; held_out: scenes
    measured on, from number first_scene on: neither trained on nor used to choose settings."""

    root: Path = Path("output/learning")
    config: Path = Path("configs/tiny.toml")
    mixes: tuple[str, ...] = MIXES
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0, 1, 2)
    vae_steps: int = 900
    base_steps: int = 2000
    steps: int = 40
    held_out: int = 128
    first_scene: int = FIRST_HELD_OUT_SCENE + 20_000
    num_inference_steps: int = 12

    def demo_settings(self, mix: str) -> DemoSettings:
        """Of the base, which is trained on this mix of candidates."""
        return DemoSettings(mix=mix, vae_steps=self.vae_steps, base_steps=self.base_steps)

    def measured_on(self) -> dict[str, int]:
        """What two cells must have in common to be compared scene by scene."""
        return {name: getattr(self, name) for name in ("first_scene", "held_out", "num_inference_steps")}

    def run_dir(self, mix: str, method: str, seed: int) -> Path:
        """The output folder of one training."""
        return self.root / "runs" / f"{mix}-{method}-{seed}"

    def cell(self, mix: str, method: str, seed: int) -> Path:
        """The file with what one training generates."""
        return self.root / "cells" / f"{mix}-{method}-{seed}.json"


@dataclass(frozen=True)
class Evaluation:
    """Held-out scenes, and the base whose experts are measured on them.

    Attributes:
        experiment: which scenes, and how images are generated.
        paths: the folders of the base.
        scenes: the held-out scenes.
    """

    experiment: Experiment
    paths: DemoPaths
    scenes: Scene

    @classmethod
    def prepare(cls, experiment: Experiment, mix: str) -> "Evaluation":
        """Draw the scenes, and make the data and the base of a mix if they do not exist yet."""
        paths = prepare(experiment.root / mix, experiment.demo_settings(mix))
        return cls(experiment, paths, make_scenes(experiment.first_scene, experiment.held_out))

    def generate(self, experts: Path | None) -> np.ndarray:
        """Generate removals [S, h, w, 3] by the experts of a run's folder or of a checkpoint; None: by the base."""
        base = (self.paths.fill, self.paths.redux, self.experiment.config)
        return generate_removals(*base, self.scenes, experts, num_inference_steps=self.experiment.num_inference_steps)

    def decode_encoded_truth(self) -> np.ndarray:
        """Encode and decode the ground truth by the base's VAE, [S, h, w, 3]."""
        return decode_encoded_truth(self.paths.fill, self.paths.redux, self.experiment.config, self.scenes)


def run(experiment: Experiment) -> None:
    """Train and measure every cell that has no result yet, cheapest comparisons first."""
    jax.config.update("jax_compilation_cache_dir", str((experiment.root / "compiled").resolve()))
    for mix in experiment.mixes:
        evaluation = Evaluation.prepare(experiment, mix)
        paths = evaluation.paths
        if not experiment.cell(mix, "base", 0).exists():
            measure_limits(evaluation, mix)
        for seed in experiment.seeds:
            for method in (name for name in METHODS if name in experiment.methods):
                steps = experiment.steps
                if method == "best_equal_time":
                    steps = round(steps * wall_time_ratio(experiment, paths, mix))
                output = experiment.run_dir(mix, method, seed)
                config = training_config(experiment, paths, method, output, steps=steps, seed=seed)
                run_cell(config, evaluation, experiment.cell(mix, method, seed))


def run_cell(config: TrainConfig, evaluation: Evaluation, cell: Path) -> None:
    """One training from the base, and what its model generates; nothing if the cell has it."""
    settings = json.loads(json.dumps(to_flat_dict(config)))
    if cell.exists():
        found = read_cell(evaluation.experiment, cell)["settings"]
        changed = {name: (found.get(name), value) for name, value in settings.items() if found.get(name) != value}
        if changed:
            raise SystemExit(f"{cell} holds a training with other settings (then, now): {changed}; give another --root")
        return
    output = Path(config.run.output_dir)
    train(config)
    rows = read_rows(output / "metrics.jsonl")
    about = {
        "settings": settings,
        "steps": config.run.max_train_steps,
        "velocity_norm_ratio": rows[-1].get("velocity_norm_ratio"),
        "clip_fraction_at_sync": [row["clip_fraction_at_sync"] for row in rows if "clip_fraction_at_sync" in row],
        "mean_ratio": float(np.mean([row["mean_ratio"] for row in rows[1:]])) if "mean_ratio" in rows[-1] else None,
    }
    measure_run(evaluation, output, cell, about)


def training_config(
    experiment: Experiment, paths: DemoPaths, method: str, output: Path, *, steps: int, seed: int
) -> TrainConfig:
    """The experiment's configuration file, with what makes the method and where its data and base are."""
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
    """How many best-of-group steps one GRPO step takes the time of: medians of both, step by step in turn.

    One measurement serves all seeds of a data set: two runs at different times would compare the machine's load.
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
            since = time.perf_counter()
            runs[name][2], _ = jax.block_until_ready(step(state, setup.frozen, batch))
            seconds[name].append(time.perf_counter() - since)
    medians = {name: float(np.median(values[2:])) for name, values in seconds.items()}  # without compilation
    file.write_text(json.dumps(medians))
    return medians["grpo"] / medians["best"]


def measure_limits(evaluation: Evaluation, mix: str) -> None:
    """The floor, the base alone, and a ceiling, the truth through the VAE."""
    for name, images in {"base": evaluation.generate(None), "roundtrip": evaluation.decode_encoded_truth()}.items():
        cell = evaluation.experiment.cell(mix, name, 0)
        write_cell(evaluation.experiment, cell, measure_removals(images, evaluation.scenes), {})


def measure_run(evaluation: Evaluation, output: Path, cell: Path, about: dict) -> None:
    """Generate with a run's experts, keep some pictures for the sheet, and write the cell."""
    images = evaluation.generate(output)
    np.savez_compressed(output / "generated.npz", images=quantize(images[:8]))
    write_cell(evaluation.experiment, cell, measure_removals(images, evaluation.scenes), about)


def measure_again(experiment: Experiment) -> None:
    """Measure every trained cell anew, on the scenes of `--first_scene`."""
    for mix in experiment.mixes:
        evaluation = Evaluation.prepare(experiment, mix)
        measure_limits(evaluation, mix)
        for method in METHODS:
            for seed in experiment.seeds:
                cell = experiment.cell(mix, method, seed)
                if cell.exists():
                    measured = ("scores", "defects", "psnr_inside")
                    about = {k: v for k, v in json.loads(cell.read_text()).items() if k not in measured}
                    measure_run(evaluation, experiment.run_dir(mix, method, seed), cell, about)


def curve(experiment: Experiment) -> None:
    """What a model generates as its training goes on: a row for every tenth of `--steps`, by the first of `--seeds`."""
    jax.config.update("jax_compilation_cache_dir", str((experiment.root / "compiled").resolve()))
    for mix in experiment.mixes:
        evaluation = Evaluation.prepare(experiment, mix)
        for method in experiment.methods:
            output = experiment.root / "curves" / f"{mix}-{method}"
            config = training_config(
                experiment, evaluation.paths, method, output, steps=experiment.steps, seed=experiment.seeds[0]
            )
            every = max(1, experiment.steps // 10)
            often = {"checkpointing_steps": every, "checkpoints_total_limit": None, "log_freq": every}
            train(from_flat_dict(to_flat_dict(config) | often))
            print(f"\n{mix}, {TITLES[method]}, {experiment.held_out} held-out scenes\n")
            print("| step | reward | mean \\|defect\\| | PSNR in mask | base loss | gradient norm |")
            print("| --- " * 6 + "|")
            for row in read_rows(output / "metrics.jsonl"):
                if row["step"] % every == 0:
                    images = evaluation.generate(output / "checkpoints" / str(row["step"]))
                    measured = measure_removals(images, evaluation.scenes)
                    reward = total_reward(measured["scores"], REWARD_WEIGHTS).mean()
                    print(
                        f"| {row['step']} | {reward:.3f} | {np.abs(measured['defects']).mean():.3f} | "
                        f"{measured['psnr_inside'].mean():.2f} | {row['base_loss']:.3f} | {row['grad_norm']:.3f} |",
                        flush=True,
                    )


def write_cell(experiment: Experiment, path: Path, measured: dict, about: dict) -> None:
    """A cell appears when it is complete, so that a kill leaves none that cannot be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {name: np.round(values, 4).tolist() for name, values in measured.items()}
    write_file(path, json.dumps(about | experiment.measured_on() | rounded))
    print(path.stem, {name: np.round(np.mean(values, 0), 3).tolist() for name, values in measured.items()}, flush=True)


def read_cell(experiment: Experiment, path: Path) -> dict:
    """A cell's contents; ends the program where it was measured on other scenes than this experiment's."""
    found, expected = json.loads(path.read_text()), experiment.measured_on()
    if on := {name: found.get(name) for name in expected if found.get(name) != expected[name]}:
        raise SystemExit(f"{path} was measured on {on}, not {expected}: `measure` does it anew, or give another --root")
    return found


def load_cells(experiment: Experiment, mix: str) -> dict[str, dict[str, np.ndarray]]:
    """By method: reward, |defect| and PSNR [seeds, scenes], defects [seeds, scenes, 4], and what the runs say."""
    cells = {}
    for method in TITLES:
        files = {seed: experiment.cell(mix, method, seed) for seed in experiment.seeds}
        seeds = [seed for seed, file in files.items() if file.exists()]
        found = [read_cell(experiment, files[seed]) for seed in seeds]
        if not found:
            continue
        defects = np.asarray([cell["defects"] for cell in found])
        cells[method] = {
            "reward": np.asarray([total_reward(np.asarray(cell["scores"]), REWARD_WEIGHTS) for cell in found]),
            "defects": defects,
            "mean_abs": np.abs(defects).mean(-1),
            "psnr": np.asarray([cell["psnr_inside"] for cell in found]),
            "about": found,
            "seeds": seeds,
        }
    return cells


def table(experiment: Experiment) -> None:
    """Print one table a data set, with paired differences to GRPO, and write a contact sheet of each."""
    for mix in experiment.mixes:
        cells = load_cells(experiment, mix)
        print(f"\n### {mix}, {experiment.held_out} held-out scenes\n")
        print("| training | seeds | steps | reward | mean \\|defect\\| | " + " | ".join(DEFECTS) + " | PSNR in mask |")
        print("| --- " * (6 + len(DEFECTS)) + "|")
        for method, cell in cells.items():
            about = cell["about"]
            steps = f"{np.mean([c['steps'] for c in about]):.0f}" if "steps" in about[0] else ""
            signed = " | ".join(f"{value:+.3f}" for value in cell["defects"].mean((0, 1)))
            print(
                f"| {TITLES[method]} | {len(about)} | {steps} | {cell['reward'].mean():.3f} | "
                f"{cell['mean_abs'].mean():.3f} | {signed} | {cell['psnr'].mean():.2f} |"
            )
        if "grpo" in cells:
            print_differences(cells)
            draw_sheet(experiment, mix)


def print_differences(cells: dict) -> None:
    """GRPO minus each other training, paired by scene and seed, with 95 % bootstrap intervals."""
    grpo = cells["grpo"]
    print("\n| GRPO minus | reward [95 %] | mean \\|defect\\| [95 %] | ratio of mean \\|defect\\| |")
    print("| --- | --- | --- | --- |")
    for method in ("standard", "score", "softmax", "best", "best_equal_time"):
        if method not in cells or cells[method]["seeds"] != grpo["seeds"]:
            continue  # not yet trained with every seed
        other, columns = cells[method], []
        for key in ("reward", "mean_abs"):
            difference = grpo[key] - other[key]
            low, high = bootstrap_interval(difference)
            columns.append(f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
        ratio = grpo["mean_abs"].mean() / other["mean_abs"].mean()
        print(f"| {TITLES[method]} | {columns[0]} | {columns[1]} | {ratio:.2f} |")
    clip = np.mean([np.mean(cell["clip_fraction_at_sync"]) for cell in grpo["about"]])
    ratio = np.mean([cell["mean_ratio"] for cell in grpo["about"]])
    drift = np.mean(np.asarray([cell["velocity_norm_ratio"] for cell in grpo["about"]], float))  # nan: short runs
    print(f"\nGRPO: clip_fraction before a sync {clip:.3f}, mean_ratio {ratio:.4f}, velocity_norm_ratio {drift:.3f}")


def draw_sheet(experiment: Experiment, mix: str) -> None:
    """Eight held-out scenes: source, truth, then each training's picture (seed 0), one row a scene."""
    scenes = make_scenes(experiment.first_scene, 8)
    columns = [quantize(panel) for panel in (scenes.source, scenes.truth)]
    for method in METHODS:
        file = experiment.run_dir(mix, method, experiment.seeds[0]) / "generated.npz"
        if file.exists():
            columns.append(np.load(file)["images"])
    path = experiment.root / f"{mix}.png"
    contact_sheet(list(zip(*columns, strict=True))).save(path)
    print(f"contact sheet (source, truth, {', '.join(METHODS)}): {path}")


def main() -> None:
    """Parse the command line and run the command."""
    commands = {"run": run, "measure": measure_again, "table": table, "curve": curve}
    tyro.extras.subcommand_cli_from_dict(commands, use_underscores=True, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
