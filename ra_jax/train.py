"""`python -m ra_jax.train`: trains experts (or the whole transformer), standard or from human scores."""

import logging
import sys

from ra_jax.config import ConfigError, parse
from ra_jax.data.records import DataError
from ra_jax.models.weights import WeightError
from ra_jax.training.checkpoints import CheckpointError


def main() -> None:
    """Parse, train; what a user can mend is told without a traceback, with exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    for chatty in ("absl", "orbax", "jax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        config = parse()
        from ra_jax.training.loop import train  # after parsing: --help needs no JAX

        output = train(config)
    except (ConfigError, DataError, WeightError, CheckpointError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    print(f"trained: {output}")


if __name__ == "__main__":
    main()
