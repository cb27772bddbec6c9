"""Check that a trained router uses all experts, and that its gates depend on the size of the mask.

    python scripts/experiments/routing.py output/tiny_grpo output/tiny_auto output/tiny_standard

The runs have to start from the demo's base. For each run, a table shows on held-out scenes:

    usage                for each expert, the fraction of the scenes in which it has the largest gate
    gates, small masks   mean gates of the third of the scenes with the smallest masks
    gates, large masks   mean gates of the third of the scenes with the largest masks
    gates, all           mean gates of all scenes

Exit status 1: an expert's usage is below 5 %, or no mean gate differs by more than 0.02 between small and large masks.
"""

import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from held_out import load_base, load_experts, make_panels, make_scenes

from ra_jax.demo.prepare import FIRST_HELD_OUT_SCENE, DemoPaths
from ra_jax.inference.sampling import diptych_condition

CONFIG = Path("configs/tiny.toml")  # has the sizes of the experts
LEAST_USAGE = 0.05  # fraction of the scenes
LEAST_DIFFERENCE = 0.02  # difference of a mean gate between small and large masks


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], demo: Path = Path("output/demo"), scenes: int = 400
) -> None:
    """Print a row of the table for each run, and exit with the status of the check.

    Args:
        runs: output folders of runs, or checkpoints.
        demo: the demo's folder.
        scenes: number of held-out scenes.
    """
    paths = DemoPaths(demo)
    base = (paths.fill, paths.redux, CONFIG)
    loaded, held_out = load_base(*base), make_scenes(FIRST_HELD_OUT_SCENE + 60_000, scenes)
    model, panels = loaded.model, make_panels(held_out, loaded.preprocess)
    compute_gates = jax.jit(
        lambda weights, frozen, panels: model.gates(weights, diptych_condition(model, frozen, panels))[0]
    )
    order = np.argsort(held_out.mask.mean((1, 2)), kind="stable")
    small, large = order[: scenes // 3], order[-(scenes // 3) :]
    failed = False
    print("| run | usage | gates, small masks | gates, large masks | gates, all |\n" + "| --- " * 5 + "|")
    for run in runs:
        weights = load_experts(*base, run)
        gates = np.asarray(compute_gates(weights, loaded.frozen, panels))
        usage = np.bincount(gates.argmax(1), minlength=gates.shape[1]) / scenes
        differs = np.abs(gates[small].mean(0) - gates[large].mean(0)).max() > LEAST_DIFFERENCE
        columns = (usage, gates[small].mean(0), gates[large].mean(0), gates.mean(0))
        print(f"| {run} | " + " | ".join(" ".join(f"{value:.2f}" for value in column) for column in columns) + " |")
        failed |= usage.min() < LEAST_USAGE or not differs
    sys.exit(int(failed))


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
