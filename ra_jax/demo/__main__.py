"""`python -m ra_jax.demo`: prepares the data and models that configs/tiny.toml uses, in `output/demo`."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro

from ra_jax.demo.prepare import DemoPaths, DemoSettings, prepare
from ra_jax.errors import UserError


@dataclass(frozen=True)
class DemoCommand:
    """Prepares synthetic scored scenes, and a tiny FLUX-Fill trained on them from scratch (minutes on 2 CPU cores)."""

    output_dir: str = "output/demo"  # folder for scenes and models; parts that already exist are kept
    settings: tyro.conf.OmitArgPrefixes[DemoSettings] = field(default_factory=DemoSettings)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, prepare the demo, and print the training command to run next."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    command = tyro.cli(DemoCommand, args=argv, prog="python -m ra_jax.demo", use_underscores=True)
    try:
        paths = prepare(command.output_dir, command.settings)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"scenes: {paths.train} and {paths.held_out}\nbase:   {paths.fill} and {paths.redux}")
    print(f"next:   {next_command(command, paths)}")


def next_command(command: DemoCommand, paths: DemoPaths) -> str:
    """Return the command that trains on the demo with configs/tiny.toml.

    Flags are added if the paths or the size are not the defaults, which configs/tiny.toml has.
    """
    parts = ["python -m ra_jax.train --config configs/tiny.toml"]
    if command.output_dir != DemoCommand.output_dir:
        parts += [
            f"--train_json_path {paths.train}/labeled_dict.json --val_json_path {paths.held_out}/triplets.json",
            f"--pretrained_model_name_or_path {paths.fill} --pretrained_redux_model_name_or_path {paths.redux}",
        ]
    if command.settings.size != DemoSettings.size:
        parts += [f'--aspect_ratio_buckets "{command.settings.size},{command.settings.size}"']
    return " ".join(parts)


if __name__ == "__main__":
    main()
