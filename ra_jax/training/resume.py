"""How a run begins: anew, over another, from its own checkpoint, or with another's experts; what is refused of it."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp

from ra_jax.checkpoints import BEST, About, find_checkpoint, read_about, restore
from ra_jax.checkpoints import FOLDER as CHECKPOINTS
from ra_jax.config.parse import to_flat_dict, to_toml
from ra_jax.config.settings import TrainConfig
from ra_jax.errors import CheckpointError, ConfigError
from ra_jax.interop.loading import LoadedModel
from ra_jax.models.fill_model import Weights
from ra_jax.reporting.trackers import FILE as METRICS
from ra_jax.training.step.state import TrainState

log = logging.getLogger(__name__)

CONFIG_FILE = "config.toml"
# All that a run writes into its folder; whatever else lies there is the user's.
RUN_FILES = (
    *(CHECKPOINTS, BEST, "previews", "tensorboard", "wandb"),
    *(METRICS, "curves.png", "report.html", CONFIG_FILE),
)

# What a resumed run may change, and what it then does not have in common with the run that it goes on with.
OTHER_DATA, ANOTHER_ROUNDING = "not through the data it would have seen", "its base rounds as the former one did not"
DIFFERS_WITH = {
    "train_batch_size": OTHER_DATA,
    "gradient_accumulation_steps": OTHER_DATA,
    "mixed_precision": ANOTHER_ROUNDING,
    "base_precision": ANOTHER_ROUNDING,
}


def checkpoint_to_resume(config: TrainConfig, output: Path) -> Path | None:
    """The checkpoint to go on from, or None for a new run. Refuses a folder that holds another run.

    `--resume_from_checkpoint latest` in a folder whose run was stopped before its first checkpoint begins anew.
    """
    where = config.run.resume_from_checkpoint
    holds_run = (output / CONFIG_FILE).exists()
    if where is not None and where != "latest":
        checkpoint = find_checkpoint(where)
        if holds_run and checkpoint != find_checkpoint(output):
            raise ConfigError(
                f"resume_from_checkpoint {checkpoint} is not the latest of the run in output_dir {output}: what is "
                "trained from here and the later checkpoints would be taken for one run; choose another --output_dir"
            )
        return checkpoint
    if where == "latest":
        try:
            return find_checkpoint(output)
        except CheckpointError:
            log.warning("--resume_from_checkpoint latest: %s holds no checkpoint yet, starting at step 0", output)
            return None
    if holds_run and not config.run.overwrite_output_dir:
        raise ConfigError(
            f"output_dir {output} already holds a run: expected a new folder; go on with it by "
            "--resume_from_checkpoint latest, delete it by --overwrite_output_dir, or choose another --output_dir"
        )
    return None


def refuse_another_seed(checkpoint: Path, seed: int) -> None:
    """Raise ConfigError where the checkpoint's run began with another seed."""
    began = read_about(checkpoint).config["seed"]
    if seed != began:
        raise ConfigError(
            f"seed {seed}: checkpoint {checkpoint} began with seed {began}, and goes on with its data order and random "
            f"draws; give --seed {began}, or begin a new run in another --output_dir"
        )


def claim_output_dir(config: TrainConfig, output: Path, *, keep: bool) -> None:
    """Make the folder and write the resolved configuration; with --overwrite_output_dir an old run's files are deleted.

    How this run began (anew, over another, resumed, with whose experts) is left out of it, so that `--config` with the
    file can resume.
    """
    if not keep and config.run.overwrite_output_dir and (output / CONFIG_FILE).exists():
        for path in (output / name for name in RUN_FILES):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    beginnings = {"overwrite_output_dir": False, "resume_from_checkpoint": None, "init_experts_from": None}
    lasting = replace(config, run=replace(config.run, **beginnings))
    (output / CONFIG_FILE).write_text(to_toml(lasting), encoding="utf-8")


def first_weights(config: TrainConfig, loaded: LoadedModel) -> Weights:
    """What training begins with: fresh weights, or another run's experts and router (averaged where it averaged)."""
    if config.run.init_experts_from is None:
        return loaded.trainable
    checkpoint = find_checkpoint(config.run.init_experts_from)
    about = read_about(checkpoint)
    refuse_another_base(checkpoint, about, loaded.fingerprint)
    log.info("beginning with the experts of %s", checkpoint)
    return restore(checkpoint, loaded.trainable, prefix="ema" if about.config["ema_decay"] else "trainable")


def refuse_another_base(checkpoint: Path, about: About, base: str) -> None:
    """Raise CheckpointError where a checkpoint's experts belong to another base."""
    if about.base != base:
        raise CheckpointError(
            f"checkpoint {checkpoint} was trained on another base (fingerprint {about.base}, this one has {base}): "
            "give --pretrained_model_name_or_path and --pretrained_redux_model_name_or_path as in its config.toml"
        )


def resumed(checkpoint: Path, state: TrainState, base: str, config: TrainConfig) -> tuple[TrainState, int]:
    """The checkpoint's state, and how many steps it has taken. Refuses another base or geometry.

    Another --policy_temperature than the checkpoint's run had takes effect; with another batch size or precision the
    run goes on, and says that its numbers will differ.
    """
    about = read_about(checkpoint)
    refuse_another_base(checkpoint, about, base)
    given = to_flat_dict(config)
    for name, differs in DIFFERS_WITH.items():
        before = about.config.get(name, given[name])  # older checkpoints do not know every flag
        if given[name] != before:
            log.warning(
                "%s is %s, the checkpoint's was %s: the run goes on, but %s", name, given[name], before, differs
            )
    log.info("resuming from %s", checkpoint)
    state = restore(checkpoint, state)
    if given["policy_temperature"] not in ("auto", about.config["policy_temperature"]):
        state = replace(state, temperature=jnp.asarray(given["policy_temperature"], state.temperature.dtype))
    return state, about.position
