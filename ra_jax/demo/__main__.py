"""`python -m ra_jax.demo`: prepares the embedded default in `output/demo`, once; configs/tiny.toml trains on it."""

import logging
import sys
from dataclasses import dataclass, field

import tyro

from ra_jax.demo.prepare import DemoSettings, prepare


@dataclass(frozen=True)
class DemoCommand:
    """Prepares synthetic scored scenes and a tiny FLUX-Fill trained on them from scratch (minutes on 2 CPU cores)."""

    output_dir: str = "output/demo"  # where scenes and models go; what is there already is kept
    settings: tyro.conf.OmitArgPrefixes[DemoSettings] = field(default_factory=DemoSettings)


def main() -> None:
    """Parse, prepare, and say what comes next."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    command = tyro.cli(DemoCommand, prog="python -m ra_jax.demo", use_underscores=True)
    try:
        paths = prepare(command.output_dir, command.settings)
    except FileExistsError as error:
        sys.exit(f"error: {error}")
    print(f"scenes: {paths.train} and {paths.held_out}\nbase:   {paths.fill} and {paths.redux}")
    print("next:   python -m ra_jax.train --config configs/tiny.toml")


if __name__ == "__main__":
    main()
