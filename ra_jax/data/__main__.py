"""Command line of the data package: `python -m ra_jax.data SUBCOMMAND`.

`validate FILE` checks a data set as training does. `pack FILE FOLDER` copies a data set to a few large files.
`synth FOLDER` generates a synthetic data set.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from ra_jax.config.settings import DataConfig, ModelConfig
from ra_jax.data.inputs import flag_inputs
from ra_jax.data.records import check_records, load_records
from ra_jax.data.scores import ScoreFormat
from ra_jax.data.summary import format_summary
from ra_jax.data.synthetic import DatasetSettings, write_dataset
from ra_jax.outputs import Outputs, check_outputs, staging_folder


def validate(
    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    use_human_scores: bool = False,
    score_format: ScoreFormat = "dict",
    need_result: bool = True,
) -> int:
    """Print a summary of a data set and all errors in its records; the exit status is 1 if there are errors.

    Args:
        file: JSON list, JSONL, mapping JSON, a folder with input/ mask/ gt/, or a pack.
        use_human_scores: require scores in every record, as training with --use_human_scores does.
        score_format: format of the scores: dict is {"removal_score": ...}, tensor is [removal, background, smoothness].
            The format is checked only with --use_human_scores.
        need_result: require a result in every record. Training with the base loss or with human scores needs results.
            Object removal (ra_jax.infer) needs none.
    """
    records, errors = check_records(
        file, need_result=need_result, use_human_scores=use_human_scores, score_format=score_format
    )
    print(f"{file}\n\n{format_summary(records)}\n")
    if not errors:
        print("no errors")
        return 0
    print(
        f"{len(errors)} error{'s' * (len(errors) > 1)} (records are counted from 0, lines from 1); the summary above "
        "does not count records with errors"
    )
    for error in errors:
        print(f"  {error}")
    return 1


def pack(
    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    latents: bool = False,
    pretrained_model_name_or_path: str = ModelConfig.pretrained_model_name_or_path,
    pretrained_redux_model_name_or_path: str = ModelConfig.pretrained_redux_model_name_or_path,
    aspect_ratio_buckets: str = DataConfig.aspect_ratio_buckets,
    mixed_precision: Literal["no", "bf16"] = "bf16",
) -> int:
    """Copy a data set to a few large files. Training reads them with --train_json_path FOLDER.

    Args:
        file: JSON list, JSONL, mapping JSON, or a folder with input/ mask/ gt/.
        folder: folder to create. Its name consists of lower-case letters, digits and _ and starts with a letter.
        latents: store resized images with their VAE latents and image tokens instead of the original files. Training
            on this pack encodes no images. It requires --no_mask_augmentation, and the flags below with equal values.
        pretrained_model_name_or_path: diffusers folder or hub id of the model whose VAE encodes the images.
        pretrained_redux_model_name_or_path: folder or hub id of the model that computes image tokens of references.
        aspect_ratio_buckets: panel sizes "height,width;..." in pixels.
        mixed_precision: dtype in which the image tokens are computed.
    """
    from ra_jax.data.pack_writer import check_pack_folder, write_pack

    inputs, nested = flag_inputs({"FILE": file})
    if latents:
        inputs |= {
            "--pretrained_model_name_or_path": [Path(pretrained_model_name_or_path).expanduser()],
            "--pretrained_redux_model_name_or_path": [Path(pretrained_redux_model_name_or_path).expanduser()],
        }
    check_pack_folder(folder, inputs, nested)
    records = load_records(file, need_result=False)
    encoder = None
    if latents:
        from ra_jax.inference.encoder import PanelEncoder

        encoder = PanelEncoder(
            pretrained_model_name_or_path,
            pretrained_redux_model_name_or_path,
            aspect_ratio_buckets=aspect_ratio_buckets,
            mixed_precision=mixed_precision,
        )
    write_pack(records, folder, encoder=encoder, progress=partial(tqdm, desc="packing", disable=None))
    total_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{len(records)} records written to {folder}, {total_bytes / 1e6:.1f} MB")
    return 0


def synth(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    scenes: int = 64,
    size: int = 64,
    mix: Literal["one_clean", "no_clean"] = "one_clean",
    candidates: int = 4,
    seed: int = 0,
    first_scene: int = 0,
) -> int:
    """Write a data set of synthetic scenes with exact ground truth and scored candidate results.

    Args:
        folder: folder to write. It receives input/ mask/ gt/ ref/ result/ and the JSON files.
        scenes: number of scenes.
        size: width and height of each image in pixels.
        mix: kinds of candidates. one_clean writes one clean candidate per scene and four with one defect each. no_clean
            gives every candidate three or four defects.
        candidates: results per scene for no_clean. one_clean always writes five.
        seed: seed of all random numbers.
        first_scene: number of the first scene. With the same seed, a scene with another number looks different.
    """
    settings = DatasetSettings(
        scenes=scenes, size=size, mix=mix, seed=seed, first_scene=first_scene, candidates=candidates
    )
    check_outputs(Outputs("FOLDER", folder, owned=[folder, staging_folder(folder)]), {})
    resolved_folder = write_dataset(folder, settings)
    print(f"{scenes} scenes written to {resolved_folder}")
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status: 1 for errors in the data, the flags or the settings, else 0."""
    commands = {"validate": validate, "pack": pack, "synth": synth}
    try:
        return tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m ra_jax.data", args=args, use_underscores=True
        )
    except ValueError as error:  # a UserError, or invalid settings of synth
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
