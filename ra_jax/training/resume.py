"""Starts, overwrites, resumes or warm-starts a run, with the checks on each."""

import logging
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
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
)
from ra_jax.config.parse import from_checkpoint, load_toml, to_flat_dict, to_toml
from ra_jax.config.settings import TrainConfig
from ra_jax.data.inputs import flag_inputs
from ra_jax.errors import CheckpointError, ConfigError, OutputError
from ra_jax.interop.diffusers import LoadedModel
from ra_jax.models.fill_model import Weights
from ra_jax.models.options import model_options
from ra_jax.outputs import Outputs, check_outputs, write_file
from ra_jax.reporting.trackers import METRICS_FILE, read_rows
from ra_jax.rl.strength import LossWeights, PolicyStrength, policy_weights
from ra_jax.training.build import objective_settings
from ra_jax.training.step.state import TrainState

log = logging.getLogger(__name__)

CONFIG_FILE = "config.toml"
PREVIOUS_CONFIG = "config.toml.before"  # copy of the last config.toml that a run replaced by other settings
# Everything else that a run writes into its folder. All other files there belong to the user.
REFERENCE_DIR = "reference"
RUN_FOLDERS = (CHECKPOINT_DIR, BEST_DIR, REFERENCE_DIR, "previews", "tensorboard", "wandb")
RUN_FILES = (METRICS_FILE, "curves.png", "report.html")

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

    `--resume_from_checkpoint latest` starts at step 0 if the run was stopped before its first checkpoint.

    Raises:
        ConfigError: the folder already holds a run, which is neither resumed nor overwritten; or the checkpoint to
            resume from is not the latest of the run in the folder.
        CheckpointError: `--resume_from_checkpoint` names a folder without a checkpoint.
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
        if holds_run and checkpoint != find_checkpoint(output):
            raise ConfigError(
                f"resume_from_checkpoint {checkpoint} is not the latest checkpoint of the run in output_dir {output}: "
                "the folder would mix the resumed run with the later checkpoints; choose another --output_dir"
            )
        return checkpoint
    if requested == "latest":
        try:
            return find_checkpoint(output)
        except CheckpointError:
            log.warning("--resume_from_checkpoint latest: %s holds no checkpoint yet, starting at step 0", output)
            return None
    if holds_run and not config.run.overwrite_output_dir:
        raise ConfigError(
            f"output_dir {output} already holds a run: expected a new folder; resume the run with "
            "--resume_from_checkpoint latest, delete it with --overwrite_output_dir, or choose another --output_dir"
        )
    return None


def is_run_folder(output: Path) -> bool:
    """Return whether the folder holds a run, that is, a config.toml or a checkpoint.

    A checkpoint in another folder does not count, even if a link in this folder leads to it.
    """
    if (output / CONFIG_FILE).is_file():
        return True
    try:
        return find_checkpoint(output).is_relative_to(output.resolve())
    except CheckpointError:
        return False


def check_config_unedited(file: Path) -> None:
    """Check that a run wrote the existing config.toml, and that nobody added comments to it.

    The only comments that a run writes are the names of the groups of settings. Edited settings are not detected, but
    `prepare_output_dir` keeps a copy of them.

    Raises:
        OutputError: the file has other comments or none, so somebody wrote or edited it.
    """
    without_strings = re.sub(r'"(\\.|[^"\\])*"', '""', file.read_text(encoding="utf-8", errors="replace"))
    comments = re.findall("#.*", without_strings)
    groups = [f"# {group.name}" for group in fields(TrainConfig)]
    if comments and all(comment in groups for comment in comments):
        return
    if any((file.parent / name).exists() for name in (*RUN_FOLDERS, *RUN_FILES)):
        reason = (
            f"it was edited: the only comments that a run writes are {', '.join(groups)}; copy your notes to another "
            "folder and restore these comments"
        )
    else:
        reason = "no run wrote it; move it (--config takes it from any other folder)"
    raise OutputError(
        f"{file}: the run would replace it with its own settings, but {reason}, or choose another --output_dir"
    )


def check_run_folder(output: Path) -> None:
    """Check that the run does not replace files that no run wrote.

    Raises:
        OutputError: a file or a non-empty folder already exists where the run writes, and the output folder has
            neither a config.toml nor a checkpoint, which would show that a run wrote it.
    """
    if is_run_folder(output):
        return
    for path in (output / name for name in (CONFIG_FILE, PREVIOUS_CONFIG, *RUN_FILES, *RUN_FOLDERS)):
        if any(path.iterdir()) if path.is_dir() else path.exists() or path.is_symlink():
            raise OutputError(
                f"{path}: the run would replace it, but nothing shows that a run wrote it: {output} holds neither "
                f"{CONFIG_FILE} nor a checkpoint; move it, or choose another --output_dir"
            )


def check_run_outputs(config: TrainConfig, output: Path, resume_from: Path | None) -> None:
    """Check that the run neither replaces nor deletes its own inputs.

    The run writes and deletes the folders `RUN_FOLDERS` and the files `RUN_FILES`. The checkpoint `resume_from` may lie
    in the run's own folder, because the run only adds checkpoints beside it.

    Raises:
        OutputError: the run would write over or into its data, its models or another run's checkpoint; the run would
            replace files that no run wrote; or the metrics.jsonl that a resumed run extends is not from a run.
        CheckpointError: `--init_experts_from` names a folder without a checkpoint.
    """
    inputs, nested = flag_inputs(
        {f"--{name}": getattr(config.data, name) for name in ("train_json_path", "val_json_path")}
    )
    for name in ("pretrained_model_name_or_path", "pretrained_redux_model_name_or_path"):
        nested[f"--{name}"] = [Path(getattr(config.model, name)).expanduser()]
    inputs["--reward_functions"] = reward_module_paths(config.rollouts.reward_functions)
    if config.run.init_experts_from is not None:
        nested["--init_experts_from"] = [find_checkpoint(config.run.init_experts_from, prefer_best=True)]
    own_folders = []
    if is_run_folder(output):
        own_folders = [(output / folder).resolve() for folder in (CHECKPOINT_DIR, BEST_DIR)]
    if resume_from is not None and resume_from.parent not in own_folders:
        nested["--resume_from_checkpoint"] = [resume_from]
    check_outputs(run_outputs(output), inputs, nested)
    check_run_folder(output)
    if resume_from is not None and (output / METRICS_FILE).exists():
        read_rows(output / METRICS_FILE)  # the resumed run extends these rows


def reward_module_paths(specs: Sequence[str]) -> list[Path]:
    """List the files that may define the rewards `MODULE:FUNCTION=WEIGHT`.

    A module may lie in the working folder or in any folder of Python's path.
    """
    modules = [spec.partition(":")[0].strip().replace(".", "/") for spec in specs if ":" in spec]
    names = [name for module in modules for name in (f"{module}.py", f"{module}/__init__.py")]
    return [Path(folder, name) for folder in ("", *sys.path) for name in names]


def check_config_not_replaced(config: TrainConfig, file: Path) -> None:
    """Check that the run neither replaces nor deletes the file of `--config`.

    The config.toml of the run itself is an exception, so that `--config` with this file can resume the run: the run
    reads its settings and writes them back. `check_config_unedited` protects any other config.toml.

    Raises:
        OutputError: the run would replace or delete the file.
    """
    check_outputs(run_outputs(Path(config.run.output_dir), (*RUN_FILES, PREVIOUS_CONFIG)), {"--config": [file]})


def run_outputs(output: Path, files: Sequence[str] = (*RUN_FILES, CONFIG_FILE, PREVIOUS_CONFIG)) -> Outputs:
    """List everything that a run writes into its folder `output`: the files named `files`, and `RUN_FOLDERS`."""
    return Outputs("--output_dir", output, [output / name for name in files], [output / name for name in RUN_FOLDERS])


def check_seed(checkpoint: Path, seed: int) -> None:
    """Raise ConfigError if the run of the checkpoint was started with another seed."""
    checkpoint_seed = read_metadata(checkpoint).config["seed"]
    if seed != checkpoint_seed:
        raise ConfigError(
            f"seed {seed}: the run of checkpoint {checkpoint} was started with seed {checkpoint_seed}, which "
            f"determines its data order and random draws; give --seed {checkpoint_seed}, or start a new run in another "
            "--output_dir"
        )


def prepare_output_dir(config: TrainConfig, output: Path, *, keep: bool) -> None:
    """Create the output folder and write the configuration with all defaults to its config.toml.

    With --overwrite_output_dir, the files of an earlier run are deleted first, unless `keep` is True. config.toml is
    replaced and not deleted, so that the folder still counts as a run if the process is killed in between. If an
    existing config.toml has other settings, it is first copied to config.toml.before.

    The settings for the start of the run (overwrite, resume, initial experts) are not written, so that `--config` with
    this file can resume the run.
    """
    if not keep and config.run.overwrite_output_dir and is_run_folder(output):
        for path in (output / name for name in (*RUN_FOLDERS, *RUN_FILES)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    defaults = {"overwrite_output_dir": False, "resume_from_checkpoint": None, "init_experts_from": None}
    config = replace(config, run=replace(config.run, **defaults))
    file = output / CONFIG_FILE
    if file.is_file() and not _has_settings(file, config):
        write_file(output / PREVIOUS_CONFIG, file.read_bytes())
        log.warning("%s has other settings than this run: a copy is kept as %s", file, output / PREVIOUS_CONFIG)
    write_file(file, to_toml(config))


def _has_settings(file: Path, config: TrainConfig) -> bool:
    """Return whether a TOML file has these settings, perhaps under former names. False if it cannot be read."""
    try:
        return to_flat_dict(from_checkpoint(load_toml(file))) == to_flat_dict(config)
    except ConfigError:
        return False


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
    return keep_data_settings(config, checkpoint)


def keep_data_settings(config: TrainConfig, checkpoint: Path) -> TrainConfig:
    """Return the configuration of a resumed run with what runs of before did by default: hold no photo out, keep all.

    Runs that lack `validation_split` have trained on all photos and kept all checkpoints, unless they said otherwise.
    """
    previous = read_metadata(checkpoint).config
    if "validation_split" in previous:
        return config
    log.warning("the run of %s held no photos out and kept its checkpoints: the resumed run does the same", checkpoint)
    run, data = config.run, replace(config.data, validation_split=0.0)
    if previous.get("checkpoints_total_limit") is None:
        run = replace(run, checkpoints_total_limit=0)
    return replace(config, data=data, run=run)


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
