"""`python -m ra_jax.data`: `validate FILE` checks a data set as training would, `synth FOLDER` makes one."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ra_jax.data.records import check_records
from ra_jax.data.scores import ScoreFormat
from ra_jax.data.summary import summary
from ra_jax.data.synthetic import write_dataset


def validate(
    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    use_human_scores: bool = False,
    score_format: ScoreFormat = "dict",
    need_result: bool = True,
) -> int:
    """Print what a data set holds and every faulty record; exit status 1 if there is one.

    Args:
        file: JSON list, JSONL, mapping JSON, or a folder with input/ mask/ gt/.
        use_human_scores: every record must have scores, as training with --use_human_scores wants.
        score_format: how they are written, {"removal_score": ...} or [removal, background, smoothness].
        need_result: every record must have a result; training does, removing objects does not.
    """
    records, faults = check_records(
        file, need_result=need_result, use_human_scores=use_human_scores, score_format=score_format
    )
    print(f"{file}\n\n{summary(records)}\n")
    if not faults:
        print("no faults")
        return 0
    print(f"{len(faults)} fault{'s' * (len(faults) > 1)}, left out above (records count from 0, lines from 1)")
    for fault in faults:
        print(f"  {fault}")
    return 1


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
        folder: where to; it gets input/ mask/ gt/ ref/ result/ and the JSON files.
        scenes: number of scenes.
        size: side of a picture, in pixels.
        mix: one clean candidate a scene and four with one defect each; or all with several defects.
        candidates: results a scene of no_clean; one_clean has five.
        seed: of everything random.
        first_scene: number of the first scene; other numbers are other scenes of the same seed.
    """
    written = write_dataset(
        folder,
        scenes=scenes,
        size=size,
        mix=mix,
        seed=seed,
        first_scene=first_scene,
        candidates=candidates,
    )
    print(f"{scenes} scenes written to {written}")
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status, 1 for data or values that will not do."""
    commands = {"validate": validate, "synth": synth}
    try:
        return tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m ra_jax.data", args=args, use_underscores=True
        )
    except (FileExistsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
