"""`python -m ra_jax.infer`: removes objects from a photo, a folder of photos or the scenes of a data set."""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from ra_jax.checkpoints import find_checkpoint, read_about
from ra_jax.config.settings import ModelConfig
from ra_jax.errors import CheckpointError, ConfigError, DataError, WeightError
from ra_jax.inference.candidates import RECORDS, find_scenes, plan_candidates, write_candidates


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """Removes objects from photos, and writes what a person needs to score the results.

    Settings of the model that are not given are those the experts were trained with.
    """

    source_image: str  # photo, folder of photos, or data set (JSON, JSONL, folder with input/ mask/)
    source_mask: str | None = None  # mask (> 127 = remove), or folder of masks named as the photos are
    ref_image: str | None = None  # the object on white, or folder of such (None: made from photo and mask)
    output_dir: str  # pictures <name>_<seed>.png and records.json are written here
    experts: str | None = None  # output_dir of a training, or one of its checkpoints (None: the base alone)
    pretrained_model_name_or_path: str | None = None  # FLUX-Fill, diffusers folder or hub id
    pretrained_redux_model_name_or_path: str | None = None  # Redux, folder or hub id
    mixed_precision: Literal["no", "bf16"] | None = None  # compute dtype (None: as trained, else bf16)
    guidance_scale: float | None = None  # embedded guidance (None: as trained, else 30)
    num_inference_steps: int = 28  # sampling steps; more are slower and finer
    seed: int = 0  # of the first candidate of each scene
    repeat: int = 1  # candidates a scene, with the seeds from --seed on
    overwrite: bool = False  # replace pictures that are there already


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, remove; what a user can mend is told without a traceback, with exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    config = tyro.cli(InferConfig, args=argv, prog="python -m ra_jax.infer", use_underscores=True)
    try:
        run(config)
    except (ConfigError, DataError, WeightError, CheckpointError) as error:
        sys.exit(f"error: {error}")


def run(config: InferConfig) -> None:
    """Make every candidate that `config` asks for; scenes and output folder are checked before a model is loaded."""
    for name in ("num_inference_steps", "repeat"):
        if getattr(config, name) < 1:
            raise DataError(f"{name} = {getattr(config, name)}: expected a value at least 1")
    scenes = find_scenes(config.source_image, config.source_mask, config.ref_image)
    seeds = range(config.seed, config.seed + config.repeat)
    candidates = plan_candidates(scenes, seeds, config.output_dir, overwrite=config.overwrite)
    settings = model_settings(config)

    from ra_jax.pipeline import RemovalPipeline  # late: the inputs are known to be sound

    pipe = RemovalPipeline.from_pretrained(
        settings["pretrained_model_name_or_path"],
        redux=settings["pretrained_redux_model_name_or_path"],
        experts=config.experts,
        dtype="bfloat16" if settings["mixed_precision"] == "bf16" else "float32",
    )

    def remove(photo: Image.Image, mask: np.ndarray, reference: Image.Image | None, seed: int) -> Image.Image:
        made = pipe(
            photo,
            Image.fromarray(mask),
            ref=reference,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=settings["guidance_scale"],
            seed=seed,
        )
        return made.images[0]

    for path in tqdm(write_candidates(candidates, remove), total=len(candidates), unit="image"):
        tqdm.write(str(path))
    print(f"records, ready to be scored: {candidates[0].path.parent / RECORDS}")


def model_settings(config: InferConfig) -> dict[str, Any]:
    """The base, its precision and guidance: as given, else as the experts were trained, else as training's defaults."""
    settings = dataclasses.asdict(ModelConfig())
    if config.experts is not None:
        trained = read_about(find_checkpoint(config.experts)).config
        settings |= {name: trained[name] for name in settings if name in trained}  # an older run lacks the newest
    given = dataclasses.asdict(config)
    return settings | {name: given[name] for name in settings if given.get(name) is not None}


if __name__ == "__main__":
    main()
