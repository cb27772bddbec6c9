"""Starts, overwrites, resumes or warm-starts a run, with the checks on each."""

import logging
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from ra_jax.checkpoints import (
    BEST_DIR,
    CHECKPOINT_DIR,
    Checkpoints,
    check_base,
    enclosing_checkpoint,
    find_checkpoint,
    is_checkpoint,
    read_metadata,
    restore,
    steps_in,
)
from ra_jax.config.parse import from_checkpoint, load_toml, to_flat_dict
from ra_jax.config.settings import TrainConfig
from ra_jax.errors import CheckpointError, ConfigError, OutputError
from ra_jax.interop.diffusers import LoadedModel
from ra_jax.models.fill_model import Weights
from ra_jax.models.options import model_options
from ra_jax.outputs import check_outputs
from ra_jax.rl.strength import LossWeights, PolicyStrength, policy_weights
from ra_jax.run_folder import (
    CONFIG_FILE,
    PREVIOUS_CONFIG,
    REFERENCE_DIR,
    check_config_unedited,
    is_run_folder,
    run_outputs,
)
from ra_jax.training.build import objective_settings
from ra_jax.training.step.state import TrainState

log = logging.getLogger(__name__)

# Settings that a resumed run may change, each with the consequence that a warning names.
OTHER_BATCHES = "its batches differ from the batches of an uninterrupted run"
OTHER_ROUNDING = "its base is computed with different rounding"
OTHER_SPLIT = "photos that are held out now may have been trained on"
RESUME_WARNINGS = {
    "validation_split": OTHER_SPLIT,
    "train_batch_size": OTHER_BATCHES,
    "gradient_accumulation_steps": OTHER_BATCHES,
    "mixed_precision": OTHER_ROUNDING,
    "base_precision": OTHER_ROUNDING,
}


def checkpoint_to_resume(config: TrainConfig, output: Path) -> Path | None:
    """Return the checkpoint to resume from, or None for a new run.

    `--resume_from_checkpoint latest` starts at step 0 if the run was stopped before its first checkpoint. The latest
    may be the one in `best/`.

    Raises:
        ConfigError: the folder already holds a run, which is neither resumed nor overwritten; or the checkpoint to
            resume from is not the latest of the run in the folder.
        CheckpointError: `--resume_from_checkpoint` names a folder without a checkpoint, or all its checkpoints lack
            files; or the run that `latest` would start anew began with other experts.
        OutputError: the folder is a folder of checkpoints or lies in one; no run wrote the folder's config.toml; or
            the folder has a file where the run needs a folder, or a folder where the run needs a file.
    """
    requested = config.run.resume_from_checkpoint
    check_outputs(run_outputs(output), {})  # no inputs: only checks that folders are folders and files are files
    if (enclosing := enclosing_checkpoint(output)) is not None:
        raise OutputError(
            f"--output_dir {output}: the run would write into {enclosing}, which holds the checkpoints of a run; "
            "choose another --output_dir"
        )
    for file in (output / CONFIG_FILE, output / PREVIOUS_CONFIG):
        if file.is_file():
            check_config_unedited(file)
    holds_run = is_run_folder(output)
    if requested is not None and requested != "latest":
        checkpoint = find_checkpoint(requested)
        if holds_run and not _is_latest(checkpoint, output):
            raise ConfigError(
                f"resume_from_checkpoint {checkpoint} is not the latest checkpoint of the run in output_dir {output}: "
                "the folder would mix the resumed run with the later checkpoints; choose another --output_dir"
            )
        return checkpoint
    if requested == "latest":
        if any(steps_in(output / folder) for folder in (CHECKPOINT_DIR, BEST_DIR)):
            return find_checkpoint(output)
        check_same_start(config, output)
        log.warning("--resume_from_checkpoint latest: %s holds no checkpoint yet, starting at step 0", output)
        return None
    if holds_run and not config.run.overwrite_output_dir:
        raise ConfigError(
            f"output_dir {output} already holds a run: expected a new folder; resume the run with "
            "--resume_from_checkpoint latest, delete it with --overwrite_output_dir, or choose another --output_dir"
        )
    return None


def _is_latest(checkpoint: Path, output: Path) -> bool:
    """Return whether a checkpoint is the latest of the run in a folder, or as late as that one."""
    latest = find_checkpoint(output)
    return checkpoint.parent.parent == latest.parent.parent and checkpoint.name == latest.name


def check_same_start(config: TrainConfig, output: Path) -> None:
    """Raise CheckpointError if the run in a folder began with other experts than the configuration's.

    Such a run was stopped before its first checkpoint, and starts again at step 0.
    """
    file = output / CONFIG_FILE
    earlier = load_toml(file).get("init_experts_from") if file.is_file() else None
    if earlier not in (None, config.run.init_experts_from):
        raise CheckpointError(
            f"{output}: the run started with the experts of {earlier}, and was stopped before its first checkpoint; "
            f"give --init_experts_from {earlier} again, or --overwrite_output_dir for a new run"
        )


def check_seed(checkpoint: Path, seed: int) -> None:
    """Raise ConfigError if the run of the checkpoint was started with another seed."""
    checkpoint_seed = read_metadata(checkpoint).config["seed"]
    if seed != checkpoint_seed:
        raise ConfigError(
            f"seed {seed}: the run of checkpoint {checkpoint} was started with seed {checkpoint_seed}, which "
            f"determines its data order and random draws; give --seed {checkpoint_seed}, or start a new run in another "
            "--output_dir"
        )


def initial_params(config: TrainConfig, loaded: LoadedModel) -> Weights:
    """Return the initial trainable weights.

    With `--init_experts_from` they are the experts and the router of another run, averaged if that run has averaged
    weights. Otherwise they are the trainable weights of the loaded model.
    """
    if config.run.init_experts_from is None:
        return loaded.trainable
    checkpoint = find_checkpoint(config.run.init_experts_from, prefer_best=True)
    metadata = read_metadata(checkpoint)
    check_base(checkpoint, metadata, loaded.fingerprint)
    log.info("starting with the experts of %s", checkpoint)
    return restore(checkpoint, loaded.trainable, prefix="ema" if metadata.config["ema_decay"] else "trainable")


def initial_experts(config: TrainConfig, resume_from: Path | None) -> str | None:
    """Return `--init_experts_from` of the run, also if it is resumed from the checkpoint `resume_from`."""
    if resume_from is None:
        return config.run.init_experts_from
    return read_metadata(resume_from).config.get("init_experts_from")


def make_reference(config: TrainConfig, trainable: Weights, resume_from: Path | None) -> Weights | None:
    """Return the weights of the policy's reference, in the form of the trainable weights; None if it is the base.

    The reference are the weights that the run started with: the base if it trains new experts, the experts of
    --init_experts_from, or the whole transformer in the dtype of the computation. A resumed run reads the experts from
    the folder `reference` of the run that it resumes.

    Args:
        config: the run's configuration.
        trainable: the initial trainable weights. They are copied, because they may be donated later.
        resume_from: the checkpoint to resume from; None for a new run.

    Raises:
        CheckpointError: a run that started with other experts is resumed, but their copy is missing.
    """
    if not objective_settings(config).uses_reference:
        return None
    if not config.experts.use_lora:
        dtype = model_options(config).dtype
        return jax.tree.map(lambda x: jnp.array(x, dtype if x.dtype == jnp.float32 else x.dtype), trainable)
    experts = initial_experts(config, resume_from)
    if experts is None:
        return None
    if resume_from is None:
        return jax.tree.map(jnp.copy, trainable)
    folder = resume_from.parent.parent / REFERENCE_DIR / "0"
    if not is_checkpoint(folder):
        raise CheckpointError(
            f"{folder} is missing: the run of checkpoint {resume_from} started with the experts of {experts}, "
            "and needs this copy of them; restore the folder, or start a new run with --init_experts_from"
        )
    return restore(folder, trainable)


def save_reference(output: Path, reference: Weights, fingerprint: str, settings: dict) -> None:
    """Write the reference into the folder `reference` of the run, unless it is there already."""
    checkpoints = Checkpoints(output, folder=REFERENCE_DIR)
    checkpoints.save(0, reference, position=0, config=settings, base=fingerprint)
    checkpoints.close()


def resumed_config(config: TrainConfig, checkpoint: Path | None) -> TrainConfig:
    """Check the seed and the estimator of a resumed run, and return its configuration (`keep_data_settings`).

    Without a checkpoint the run is new, and the configuration is returned as it is.
    """
    if checkpoint is None:
        return config
    check_seed(checkpoint, config.run.seed)
    check_estimator(checkpoint, config)
    config = replace(config, run=replace(config.run, init_experts_from=None))  # the checkpoint has the experts
    return keep_data_settings(config, checkpoint)


def keep_data_settings(config: TrainConfig, checkpoint: Path) -> TrainConfig:
    """Return the configuration of a resumed run with the held-out photos and the kept checkpoints of its checkpoint.

    `validation_split` and `checkpoints_total_limit` of the checkpoint replace those of `config` that are the defaults.
    Without this, a run that was started without `validation_split`, as all runs of 0.1.0 were, would judge itself by
    photos that it has trained on, and would delete checkpoints that it has kept.
    """
    previous = {"validation_split": 0.0, "checkpoints_total_limit": 0} | read_metadata(checkpoint).config
    groups = {"validation_split": "data", "checkpoints_total_limit": "run"}
    for name, group in groups.items():
        settings, earlier = getattr(config, group), previous[name] or 0
        default = type(settings).__dataclass_fields__[name].default
        if getattr(settings, name) == default != earlier:
            log.warning(
                "%s is %s, as in the run of %s; to change it, give another value than the default %s",
                name,
                earlier,
                checkpoint,
                default,
            )
            config = replace(config, **{group: replace(settings, **{name: earlier})})
    return config


def check_estimator(checkpoint: Path, config: TrainConfig) -> None:
    """Raise ConfigError if the run of the checkpoint was trained with another policy estimator."""
    previous = read_metadata(checkpoint).config
    estimator = from_checkpoint(previous).grpo.estimator
    center = previous.get("nft_about", "old")  # runs without this setting were about the old policy
    if config.uses_policy and estimator == config.grpo.estimator == "nft" and center != config.grpo.nft_about:
        raise ConfigError(
            f"nft_about = {config.grpo.nft_about}: the run of checkpoint {checkpoint} was trained about {center}, "
            f"which is another loss; give --nft_about {center}, or start a new run"
        )
    if config.uses_policy and estimator != config.grpo.estimator:
        raise ConfigError(
            f"policy_estimator = {config.grpo.policy_estimator} ({config.grpo.estimator}): the run of checkpoint "
            f"{checkpoint} was trained with {estimator}, which has another loss; give --policy_estimator {estimator}, "
            "or start a new run, with --init_experts_from if you like"
        )


def restore_state(
    checkpoint: Path, state: TrainState, fingerprint: str, config: TrainConfig, weights: LossWeights
) -> tuple[TrainState, int]:
    """Restore the train state from a checkpoint, and return it with the number of steps done.

    If --policy_temperature is a number and differs from the checkpoint's setting, the number becomes the temperature.
    The same holds for --policy_strength. If a weight of a loss differs, the weights of the policy loss are computed
    again for the checkpoint's strength. Another batch size or precision is allowed, with a warning that the numbers
    will differ.

    Args:
        checkpoint: the checkpoint.
        state: the train state before step 0, with the shapes and shardings to restore.
        fingerprint: fingerprint of the frozen base.
        config: the run's configuration.
        weights: weights of the run's losses.

    Raises:
        CheckpointError: the base or the geometry differs from the checkpoint's.
    """
    metadata = read_metadata(checkpoint)
    check_base(checkpoint, metadata, fingerprint)
    settings = to_flat_dict(config)
    for name, consequence in RESUME_WARNINGS.items():
        value = settings[name]
        previous = metadata.config.get(name, value)  # older checkpoints lack newer flags
        if value != previous:
            log.warning(
                "%s is %s, and was %s in the checkpoint: the run continues, but %s", name, value, previous, consequence
            )
    log.info("resuming from %s", checkpoint)
    state = restore(checkpoint, state)
    if settings["policy_temperature"] not in ("auto", metadata.config["policy_temperature"]):
        state = replace(state, temperature=jnp.asarray(settings["policy_temperature"], state.temperature.dtype))
    if state.strength is not None:
        state = replace(state, strength=_restored_strength(state.strength, config, metadata.config, weights))
    return state, metadata.position


def _restored_strength(
    saved: PolicyStrength, config: TrainConfig, previous: dict, weights: LossWeights
) -> PolicyStrength:
    """Return the checkpoint's strength, or another one if the settings that determine it have changed."""
    settings, given = to_flat_dict(config), config.grpo.policy_strength
    names = ("base_loss_weight", "policy_loss_weight", "kl_weight")
    if given in ("auto", previous["policy_strength"]) and all(settings[name] == previous[name] for name in names):
        return saved
    return policy_weights(float(saved.strength) if given == "auto" else given, weights)
