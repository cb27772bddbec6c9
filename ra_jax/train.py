"""`python -m ra_jax.train`: trains experts or the whole transformer from results, human scores or automatic rewards."""

import logging
import re
import sys
from collections.abc import Sequence

from jax.errors import JaxRuntimeError

from ra_jax.config.parse import config_file, parse
from ra_jax.errors import UserError

REPORTED_ERRORS = (UserError, FloatingPointError)
OUT_OF_MEMORY = (
    "try a smaller --train_batch_size with more --gradient_accumulation_steps, --gradient_checkpointing full (or "
    "points if there is a policy loss), fewer --num_policy_timesteps, a smaller --decode_batch_size, smaller "
    "--aspect_ratio_buckets, a lower --lora_rank; on a GPU also XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and train. Errors that a user can fix are printed without a traceback, with exit status 1."""
    # force: Orbax has installed a log handler, and without force basicConfig() would then do nothing.
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    for library in ("absl", "orbax", "jax"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("absl").addFilter(_drop_traceback)
    try:
        config, file = parse(argv), config_file(argv)
        # Imported after parsing, so that --help and wrong flags are answered at once.
        from ra_jax.parallel.processes import initialize

        initialize(config.parallel)
        from ra_jax.run_folder import check_config_not_replaced
        from ra_jax.training.loop import train

        if file is not None:
            check_config_not_replaced(config, file)
        output = train(config)
    except REPORTED_ERRORS as error:
        sys.exit(f"error: {error}")
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            sys.exit(f"error: out of memory: {OUT_OF_MEMORY}\n{error}")
        # The compiled step calls Python reward functions. JAX reports their errors as JaxRuntimeError.
        if reward_error := re.search(r"RewardError: (.*)", str(error)):
            sys.exit(f"error: {reward_error[1]}")
        raise
    print(f"trained: {output}")


def _drop_traceback(record: logging.LogRecord) -> bool:
    """Keep the message of Orbax's log records only. Its threads log the tracebacks of errors that are raised, too."""
    record.exc_info = None
    return True


if __name__ == "__main__":
    main()
