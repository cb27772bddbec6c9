"""Check that a trained router uses all experts, that its gates depend on the image, and that the experts differ.

    python scripts/experiments/routing.py output/tiny_grpo output/tiny_auto output/tiny_standard

The runs have to start from the demo's base. For each run, a table shows on held-out scenes:

    usage                for each expert, the fraction of the scenes in which it has the largest gate
    gates                mean gates of all scenes
    information          mutual information of expert and scene in nats: the entropy of the mean gates, minus the mean
                         entropy of the gates
    largest cosine       of the velocity contributions of two experts. The contribution of expert i is what the velocity
                         changes by if it has its gate and all other experts are off. Mean over scenes and times
    gates, small masks   mean gates of the third of the scenes with the smallest masks
    gates, large masks   mean gates of the third of the scenes with the largest masks

Exit status 1: for a run, a usage or a mean gate is below 0.1, the information is below 0.05 nats, or a cosine is 0.95
or more.
"""

import sys
from itertools import combinations
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from held_out import load_base, load_experts, make_panels, make_scenes, print_heads, print_row

from ra_jax.data.synthetic import quantize
from ra_jax.demo.prepare import FIRST_HELD_OUT_SCENE, DemoPaths
from ra_jax.flow.path import interpolate
from ra_jax.inference.sampling import as_diptych, diptych_condition
from ra_jax.models.lora import Adapter

LEAST_USAGE, LEAST_GATE, LEAST_INFORMATION, COSINE_LIMIT = 0.1, 0.1, 0.05, 0.95
TIMES = (0.3, 0.6, 0.9)  # at which contributions are compared
COMPARED_SCENES = 64  # number of scenes on which contributions are compared, at most


def entropy(gates: np.ndarray) -> np.ndarray:
    """Return the entropy of gates [..., E] in nats."""
    return -(gates * np.log(np.maximum(gates, 1e-12))).sum(-1)


def cosines(contributions: np.ndarray) -> dict[tuple[int, int], float]:
    """Return the mean cosine of each pair of experts; contributions [E, B, ...]."""
    flat = contributions.reshape(*contributions.shape[:2], -1).astype(np.float64)
    unit = flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)
    return {(i, j): float((unit[i] * unit[j]).sum(-1).mean()) for i, j in combinations(range(len(flat)), 2)}


class Router:
    """The router and the experts of a run, on held-out scenes."""

    def __init__(self, run: Path, demo: DemoPaths, scenes: int):
        base = (demo.fill, demo.redux, run / "config.toml")
        loaded, self._held_out = load_base(*base), make_scenes(FIRST_HELD_OUT_SCENE + 60_000, scenes)
        self._model, self._frozen = loaded.model, loaded.frozen
        self._weights = load_experts(*base, run)
        self._panels = make_panels(self._held_out, loaded.preprocess)
        self.mask_sizes = self._held_out.mask.mean((1, 2))

    def gates(self) -> np.ndarray:
        """Return the gates of all scenes, [scenes, E]."""
        model = self._model
        compute = jax.jit(lambda *x: model.gates(x[0], diptych_condition(model, x[1], x[2]))[0])
        return np.asarray(compute(self._weights, self._frozen, self._panels))

    def contributions(self, gates: np.ndarray) -> np.ndarray:
        """Return what each expert alone adds to the velocity, [E, scenes · times, N, 4C], for some of the scenes."""
        count = min(COMPARED_SCENES, len(gates))
        panels = {name: value[:count] for name, value in self._panels.items()}
        result = jnp.asarray(quantize(self._held_out.truth[:count]))
        model = self._model

        @jax.jit
        def compute(weights, frozen, t, key, gates):
            condition = diptych_condition(model, frozen, panels)
            clean = model.encode(frozen, as_diptych(panels | {"result": result}, "result"))
            x_t = interpolate(clean, jax.random.normal(key, clean.shape), t)

            def velocity(gates):
                return model.velocity(weights, frozen, x_t, t, condition, adapter=Adapter(gates), guidance_scale=30.0)

            alone = jnp.eye(gates.shape[1])[:, None] * gates  # [E, B, E]: one expert has its gate, the others 0
            return jnp.stack([velocity(x) for x in alone]) - velocity(jnp.zeros_like(gates))

        parts = [
            compute(self._weights, self._frozen, jnp.full(count, t), jax.random.key(i), jnp.asarray(gates[:count]))
            for i, t in enumerate(TIMES)
        ]
        return np.concatenate(parts, axis=1)


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], demo: Path = Path("output/demo"), scenes: int = 400
) -> None:
    """Print a row of the table for each run, and exit with the status of the check.

    Args:
        runs: output folders of runs.
        demo: the demo's folder.
        scenes: number of held-out scenes.
    """
    failed = False
    heads = ("run", "usage", "gates", "information", "largest cosine", "gates, small masks", "gates, large masks")
    print_heads(heads)
    for run in runs:
        router = Router(run, DemoPaths(demo), scenes)
        gates = router.gates()
        order = np.argsort(router.mask_sizes, kind="stable")
        small, large = order[: scenes // 3], order[-(scenes // 3) :]
        usage, mean = np.bincount(gates.argmax(1), minlength=gates.shape[1]) / scenes, gates.mean(0)
        information = entropy(mean) - entropy(gates).mean()
        cosine = max(cosines(router.contributions(gates)).values())
        listed = [
            " ".join(f"{x:.2f}" for x in row) for row in (usage, mean, gates[small].mean(0), gates[large].mean(0))
        ]
        columns = (*listed[:2], f"{information:.3f}", f"{cosine:.2f}", *listed[2:])
        print_row(run, *columns)
        failed |= usage.min() < LEAST_USAGE or mean.min() < LEAST_GATE
        failed |= information < LEAST_INFORMATION or not cosine < COSINE_LIMIT
    sys.exit(int(failed))


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
