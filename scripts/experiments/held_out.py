"""Removals of held-out scenes, their measurements, and bootstrap intervals of paired differences; files and commands.

The experiments import this module and no other script. A held-out scene is a synthetic scene of the demo that no
training uses. Arrays have one row for each scene; images are float32 [S, h, w, 3] in [0, 1].

`fill` and `redux` are the model folders of a base, and `config` is the TOML file of a training run. The file sets the
sizes of the experts, the number of prompt tokens and the guidance scale.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import orbax.checkpoint as ocp
import tyro
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from ra_jax.checkpoints import find_checkpoint, restore
from ra_jax.config.parse import from_flat_dict, load_toml
from ra_jax.data.synthetic import Scene, draw_scenes, measure_defects, quantize, rule_scores, stack_scenes
from ra_jax.demo.prepare import DemoSettings
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.inference.sampling import initial_noise, make_remover
from ra_jax.interop.diffusers import LoadedModel, load_fill_model
from ra_jax.models.fill_model import Weights
from ra_jax.models.options import ModelOptions, expert_configs
from ra_jax.outputs import write_file
from ra_jax.rewards.registry import REWARDS, SCORES, RewardInputs
from ra_jax.training.step.state import example_keys, stream_key

matplotlib.use("Agg")
BATCH_SIZE = 32  # scenes in one call of the remover
SMALLEST_ERROR = 1e-10  # mean squared error; limits PSNR to 100 dB


def make_scenes(first: int, count: int) -> Scene:
    """Draw the demo's scenes number first … first + count − 1 as one `Scene` of arrays [S, ...]."""
    settings = DemoSettings()
    return stack_scenes(draw_scenes(settings.seed, first, count, settings.size))


@lru_cache(maxsize=1)
def load_base(fill: Path, redux: Path, config: Path) -> LoadedModel:
    """Load a base in float32 with fresh experts and router, which do not change its output; cache the latest one."""
    settings = from_flat_dict(load_toml(config))
    options = ModelOptions("float32", settings.model.max_sequence_length, *expert_configs(settings.experts))
    return load_fill_model(str(fill), str(redux), options)


def load_experts(fill: Path, redux: Path, config: Path, run: Path) -> Weights:
    """Load the experts and router of a run's output folder (its latest checkpoint) or of a checkpoint folder."""
    return restore(find_checkpoint(run), load_base(fill, redux, config).trainable, prefix="trainable")


def read_state(checkpoint: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a checkpoint's state by name, such as "strength.strength"."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return {name: np.asarray(array) for name, array in reader.restore(checkpoint / "state").items()}


def make_panels(scenes: Scene, preprocess: Callable[[Image.Image], np.ndarray]) -> dict[str, np.ndarray]:
    """Make the batch that the loader would make of the scenes.

    Args:
        scenes: S scenes.
        preprocess: reference image -> Redux pixels [s, s, 3] (`LoadedModel.preprocess`).

    Returns:
        source, reference: uint8 [S, h, w, 3].
        mask: uint8 [S, h, w].
        redux_pixels: float32 [S, s, s, 3].
    """
    panels = {name: quantize(getattr(scenes, name)) for name in ("source", "reference")}
    pixels = np.stack([preprocess(Image.fromarray(panel)) for panel in panels["reference"]])
    return panels | {"mask": scenes.mask.astype(np.uint8), "redux_pixels": pixels}


def generate_removals(
    fill: Path,
    redux: Path,
    config: Path,
    scenes: Scene,
    experts: Path | Weights | None = None,
    *,
    num_inference_steps: int,
    seed: int = 0,
) -> np.ndarray:
    """Generate images [S, h, w, 3] of the scenes without their objects. They are not blended with the source.

    Row i always starts from the same noise, so that experts can be compared scene by scene.

    Args:
        fill, redux, config: the base (see the module's docstring).
        scenes: S scenes.
        experts: a run's output folder, a checkpoint folder, or weights as in `LoadedModel.trainable`. None: the base.
        num_inference_steps: Euler steps.
        seed: seed of the noise.
    """
    loaded = load_base(fill, redux, config)
    if experts is None:
        experts = loaded.trainable
    elif isinstance(experts, Path):
        experts = load_experts(fill, redux, config, experts)
    remove = _compile_remover(fill, redux, config, num_inference_steps)
    panels = make_panels(scenes, loaded.preprocess)
    count, height, width = panels["mask"].shape
    keys = example_keys(stream_key(seed, "held-out"), jnp.arange(count))
    noise = initial_noise(loaded.model, keys, height, width)
    images = []
    for first in range(0, count, BATCH_SIZE):
        rows = slice(first, first + BATCH_SIZE)
        batch = {name: panel[rows] for name, panel in panels.items()}
        images.append(np.asarray(remove(experts, loaded.frozen, batch, noise[rows])[0]))
    return np.concatenate(images)


@lru_cache(maxsize=1)
def _compile_remover(fill: Path, redux: Path, config: Path, num_inference_steps: int) -> Callable:
    """Call `make_remover` for this base; cache the latest one, so that all experts of a base share one program."""
    return make_remover(
        load_base(fill, redux, config).model,
        FlowSchedule.from_folder(fill),
        num_inference_steps=num_inference_steps,
        guidance_scale=from_flat_dict(load_toml(config)).model.guidance_scale,
    )


def decode_encoded_truth(fill: Path, redux: Path, config: Path, scenes: Scene) -> np.ndarray:
    """Encode the ground truth with the VAE, as a diptych with its reference, and decode it: [S, h, w, 3].

    The tables call this the ceiling, because generated images pass through the same decoder.
    """
    loaded = load_base(fill, redux, config)
    model, frozen = loaded.model, loaded.frozen
    diptych = np.concatenate([scenes.reference, scenes.truth], axis=2).astype(np.float32)
    _, height, width, _ = diptych.shape
    grid = (height // model.size_multiple, width // model.size_multiple)
    decoded = jax.jit(lambda frozen, x: model.decode(frozen, model.encode(frozen, x), grid))(frozen, diptych)
    return np.clip(np.asarray(decoded)[:, :, width // 2 :], 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class HeldOutScenes:
    """Held-out scenes, and the base whose experts remove their objects.

    Attributes:
        fill, redux, config: the base (see the module's docstring).
        scenes: S held-out scenes.
        num_inference_steps: Euler steps of a removal.
    """

    fill: Path
    redux: Path
    config: Path
    scenes: Scene
    num_inference_steps: int

    def generate(self, experts: Path | None) -> np.ndarray:
        """Generate removals [S, h, w, 3] with the experts in the folder of a run or a checkpoint; None: the base."""
        base = (self.fill, self.redux, self.config)
        return generate_removals(*base, self.scenes, experts, num_inference_steps=self.num_inference_steps)

    def decode_encoded_truth(self) -> np.ndarray:
        """Encode the ground truth with the base's VAE and decode it, [S, h, w, 3]."""
        return decode_encoded_truth(self.fill, self.redux, self.config, self.scenes)


def measure_removals(images: np.ndarray, scenes: Scene) -> dict[str, np.ndarray]:
    """Compare images [S, h, w, 3] with the ground truth of their scenes.

    Returns:
        scores: [S, 3], removal, background and smoothness by `rule_scores`, in [0, 1]. `total_reward` computes the
            reward from them.
        defects: [S, 4], signed strengths in the order of `DEFECTS`. 0 means that the defect is absent.
        psnr_inside: [S], PSNR over the pixels of the mask in dB, at most 100.
    """
    inside = scenes.mask[..., None]
    error = ((images - scenes.truth) ** 2 * inside).sum((1, 2, 3)) / (3 * inside.sum((1, 2, 3)))
    return {
        "scores": rule_scores(images, scenes),
        "defects": measure_defects(images, scenes),
        "psnr_inside": _decibels(error),
    }


def measure_rewards(images: np.ndarray, scenes: Scene, decoded_truth: np.ndarray) -> dict[str, np.ndarray]:
    """Score images [S, h, w, 3] with the automatic rewards that use the ground truth.

    Args:
        images: S images.
        scenes: their scenes.
        decoded_truth: [S, h, w, 3], the result of `decode_encoded_truth`.

    Returns:
        scores: [S, 3] in [0, 1], in the order of `SCORES`.
        psnr: [S], PSNR over all pixels in dB, at most 100.
    """
    source, truth, mask = (jnp.asarray(x, jnp.float32) for x in (scenes.source, scenes.truth, scenes.mask))
    inputs = RewardInputs(jnp.asarray(images), source, mask, truth, jnp.asarray(decoded_truth))
    error = ((images - scenes.truth) ** 2).mean((1, 2, 3))
    return {"scores": np.asarray(_score(inputs), np.float64), "psnr": _decibels(error)}


@jax.jit
def _score(inputs: RewardInputs) -> jax.Array:
    """Compute the scores [S, 3] of the rewards that use the ground truth."""
    return jnp.stack([REWARDS[name].function(inputs) for name in SCORES], -1)


def _decibels(error: np.ndarray) -> np.ndarray:
    """Convert mean squared errors to PSNR."""
    return -10.0 * np.log10(np.maximum(error, SMALLEST_ERROR))


def bootstrap_interval(differences: np.ndarray, samples: int = 4000, seed: int = 0) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval of the mean of paired differences.

    A bootstrap sample draws training seeds with replacement, and independently scenes with replacement. Its mean is
    over all pairs of a drawn seed and a drawn scene.

    Args:
        differences: [seeds, scenes], a measurement of one training minus that of another, by seed and scene.
        samples: number of bootstrap samples.
        seed: of the random generator.

    Returns:
        The 2.5 % and 97.5 % quantiles of the means of the samples.
    """
    rng = np.random.default_rng(seed)
    seeds = rng.integers(differences.shape[0], size=(samples, differences.shape[0]))
    rows = rng.integers(differences.shape[1], size=(samples, differences.shape[1]))
    means = differences[seeds[:, :, None], rows[:, None, :]].mean((1, 2))
    return tuple(np.quantile(means, [0.025, 0.975]))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file; make its folder. The file appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(content))


def print_row(*columns: object) -> None:
    """Print a row of a table."""
    print("| " + " | ".join(map(str, columns)) + " |", flush=True)


def print_heads(heads: Sequence[str]) -> None:
    """Print the first two rows of a table."""
    print()
    print_row(*heads)
    print_row(*("---" for _ in heads))


def save_figure(figure: Figure, path: Path) -> Path:
    """Save a figure as a PNG file, close it, and return the path of the file."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def run_commands(commands: Mapping[str, Callable[[Any], None]]) -> None:
    """Run the command that the command line names; `commands` are functions of an experiment's settings, by name."""
    tyro.extras.subcommand_cli_from_dict(dict(commands), use_underscores=True, config=(tyro.conf.OmitArgPrefixes,))
