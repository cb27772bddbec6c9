"""`python -m ra_jax.infer`: removes objects from a photo, from a folder of photos, or from the scenes of a data set."""

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from ra_jax.checkpoints import BEST_DIR, CHECKPOINT_DIR, find_checkpoint, read_metadata
from ra_jax.config.ranges import at_least, out_of_range
from ra_jax.config.settings import ModelConfig
from ra_jax.data.formats import RECORDS_FILE
from ra_jax.data.inputs import flag_inputs, image_paths, record_paths
from ra_jax.data.records import Record
from ra_jax.errors import DataError, UserError
from ra_jax.inference.candidates import (
    Candidate,
    check_overwrite,
    find_scenes,
    plan_candidates,
    write_candidates,
)
from ra_jax.outputs import Outputs, check_outputs


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """Removes objects from photos; writes the results, and a data set to which scores can be added.

    The default of each model setting is the value that the experts were trained with. Without experts, it is the
    default of training.
    """

    source_image: str  # photo, folder of photos, or data set (JSON, JSONL, folder with input/ mask/)
    source_mask: str | None = None  # mask (> 127 = remove), or folder of masks with the photos' names
    ref_image: str | None = None  # object on white, or folder of such images (None: made from photo and mask)
    output_dir: str  # folder for the images <name>_<seed>.png and for records.json
    experts: str | None = None  # output_dir of a training run, or a checkpoint (None: base without experts)
    pretrained_model_name_or_path: str | None = None  # FLUX-Fill, diffusers folder or hub id
    pretrained_redux_model_name_or_path: str | None = None  # Redux, diffusers folder or hub id
    mixed_precision: Literal["no", "bf16"] | None = None  # compute dtype (None: as trained, else bf16)
    guidance_scale: float | None = None  # embedded guidance (None: as trained, else 30)
    num_inference_steps: Annotated[int, at_least(1)] = 28  # sampling steps; more steps are slower and finer
    seed: int = 0  # seed of the first candidate of each scene
    repeat: Annotated[int, at_least(1)] = 1  # candidates per scene, with seeds --seed, --seed + 1, ...
    overwrite: bool = False  # replace earlier results (other files are never replaced)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and run; a UserError exits with its message and status 1, without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    config = tyro.cli(InferConfig, args=argv, prog="python -m ra_jax.infer", use_underscores=True)
    try:
        run(config)
    except UserError as error:
        sys.exit(f"error: {error}")


def run(config: InferConfig) -> None:
    """Write all candidates of a configuration. Scenes and output folder are checked before a model is loaded.

    Raises:
        UserError: a setting is out of range, a scene cannot be used, a file would be overwritten, or a model could not
            be loaded.
    """
    if lines := list(out_of_range(config)):
        raise DataError("\n".join(lines))
    scenes = find_scenes(config.source_image, config.source_mask, config.ref_image)
    seeds = range(config.seed, config.seed + config.repeat)
    candidates = plan_candidates(scenes, seeds, config.output_dir)
    settings = model_settings(config)
    check_output_paths(config, settings, candidates)
    check_overwrite(candidates, overwrite=config.overwrite)

    # Imported after the checks, because this import takes seconds and wrong inputs should be reported at once.
    from ra_jax.pipeline import RemovalPipeline

    if config.experts is not None:
        print(f"experts: {find_checkpoint(config.experts, prefer_best=True)}")
    pipe = RemovalPipeline.from_pretrained(
        settings["pretrained_model_name_or_path"],
        redux=settings["pretrained_redux_model_name_or_path"],
        experts=config.experts,
        dtype="bfloat16" if settings["mixed_precision"] == "bf16" else "float32",
    )

    def remove(photo: Image.Image, mask: np.ndarray, reference: Image.Image | None, seed: int) -> Image.Image:
        output = pipe(
            photo,
            Image.fromarray(mask),
            ref=reference,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=settings["guidance_scale"],
            seed=seed,
        )
        return output.images[0]

    for path in tqdm(write_candidates(candidates, remove), total=len(candidates), unit="image"):
        tqdm.write(str(path))
    print(f"records ready to be scored: {candidates[0].path.parent / RECORDS_FILE}")


def check_output_paths(config: InferConfig, settings: Mapping[str, Any], candidates: Sequence[Candidate]) -> None:
    """Raise OutputError if an image or records.json would replace an input, or be written into an input folder."""
    folder = Path(config.output_dir)
    inputs, nested = _scene_inputs(config, [candidate.scene for candidate in candidates])
    models = ("pretrained_model_name_or_path", "pretrained_redux_model_name_or_path")
    nested |= {f"--{name}": [Path(settings[name]).expanduser()] for name in models}
    if config.experts is not None:
        nested |= {"--experts": _checkpoint_folders(config.experts)}
    files = [*(candidate.path for candidate in candidates), folder / RECORDS_FILE]
    check_outputs(Outputs("--output_dir", folder, files), inputs, nested)


def _scene_inputs(config: InferConfig, scenes: Sequence[Record]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return the files that are read for the scenes, as the arguments `inputs` and `nested` of `check_outputs`.

    A folder is read as a data set only if --source_mask is not given.
    """
    if config.source_mask is None:
        inputs, nested = flag_inputs({"--source_image": config.source_image})
        return {"--source_image": inputs["--source_image"] + record_paths(scenes)}, nested
    paths = {
        "--source_image": config.source_image,
        "--source_mask": config.source_mask,
        "--ref_image": config.ref_image,
    }
    return {flag: image_paths(Path(path)) for flag, path in paths.items() if path is not None}, {}


def _checkpoint_folders(experts: str) -> list[Path]:
    """Return the checkpoint that is read, and the folders with all checkpoints of its run."""
    checkpoint = find_checkpoint(experts, prefer_best=True)
    runs = [Path(experts)]
    if checkpoint.parent.name in (CHECKPOINT_DIR, BEST_DIR):
        runs.append(checkpoint.parent.parent)
    return [checkpoint, *(run / name for run in runs for name in (CHECKPOINT_DIR, BEST_DIR))]


def model_settings(config: InferConfig) -> dict[str, Any]:
    """Return all settings of `ModelConfig` by name, such as base model, precision and guidance.

    A flag determines its setting. Settings without a flag are taken from the experts' training run. Settings that are
    not there either have the default of training.
    """
    settings = dataclasses.asdict(ModelConfig())
    if config.experts is not None:
        trained = read_metadata(find_checkpoint(config.experts, prefer_best=True)).config
        # The settings of an older run may lack names that were added since.
        settings |= {name: trained[name] for name in settings if name in trained}
    flags = dataclasses.asdict(config)
    return settings | {name: flags[name] for name in settings if flags.get(name) is not None}


if __name__ == "__main__":
    main()
