"""How a run begins: anew, over another, from its own checkpoint, or with another's experts; what is refused of it."""

import logging
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import jax.numpy as jnp

from ra_jax.checkpoints import (
    BEST_DIR,
    CHECKPOINT_DIR,
    check_base,
    enclosing_checkpoint,
    find_checkpoint,
    read_metadata,
    restore,
)
from ra_jax.config.parse import to_flat_dict, to_toml
from ra_jax.config.settings import TrainConfig
from ra_jax.data.inputs import flag_inputs
from ra_jax.errors import CheckpointError, ConfigError, OutputError
from ra_jax.interop.diffusers import LoadedModel
from ra_jax.models.fill_model import Weights
from ra_jax.outputs import Outputs, check_outputs, write_file
from ra_jax.reporting.trackers import METRICS_FILE, read_rows
from ra_jax.training.step.state import TrainState

log = logging.getLogger(__name__)

CONFIG_FILE = "config.toml"
PREVIOUS_CONFIG = "config.toml.before"  # the last config.toml that a run replaced by other settings
# All that a run writes into its folder beside these two; whatever else lies there is the user's.
RUN_FOLDERS = (CHECKPOINT_DIR, BEST_DIR, "previews", "tensorboard", "wandb")
RUN_FILES = (METRICS_FILE, "curves.png", "report.html")

# What a resumed run may change, and what it then does not have in common with the run that it goes on with.
OTHER_DATA, ANOTHER_ROUNDING = "not through the data it would have seen", "its base rounds as the former one did not"
RESUME_WARNINGS = {
    "train_batch_size": OTHER_DATA,
    "gradient_accumulation_steps": OTHER_DATA,
    "mixed_precision": ANOTHER_ROUNDING,
    "base_precision": ANOTHER_ROUNDING,
}


def checkpoint_to_resume(config: TrainConfig, output: Path) -> Path | None:
    """The checkpoint to go on from, or None for a new run. Refuses a folder that holds another run, or a config.toml
    that no run wrote, or checkpoints alone.

    `--resume_from_checkpoint latest` in a folder whose run was stopped before its first checkpoint begins anew.
    """
    where = config.run.resume_from_checkpoint
    check_outputs(run_outputs(output), {})  # that folders are folders and files are files
    if (around := enclosing_checkpoint(output)) is not None:
        raise OutputError(
            f"--output_dir {output}: would write into {around}, where a run keeps its checkpoints; choose another "
            "--output_dir"
        )
    for file in (output / CONFIG_FILE, output / PREVIOUS_CONFIG):
        if file.is_file():
            check_config_unedited(file)
    held = is_run_folder(output)
    if where is not None and where != "latest":
        checkpoint = find_checkpoint(where)
        if held and checkpoint != find_checkpoint(output):
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
    if held and not config.run.overwrite_output_dir:
        raise ConfigError(
            f"output_dir {output} already holds a run: expected a new folder; go on with it by "
            "--resume_from_checkpoint latest, delete it by --overwrite_output_dir, or choose another --output_dir"
        )
    return None


def is_run_folder(output: Path) -> bool:
    """Whether the folder is a run's: it has a config.toml, or a checkpoint that does not lie elsewhere, by a link."""
    if (output / CONFIG_FILE).is_file():
        return True
    try:
        return find_checkpoint(output).is_relative_to(output.resolve())
    except CheckpointError:
        return False


def check_config_unedited(file: Path) -> None:
    """Check that a run wrote the config.toml that this run would replace: its only comments are the groups' names.

    Values that were edited do not show; `prepare_output_dir` keeps a copy of them.

    Raises:
        OutputError: it has other comments, or none, so that somebody wrote or edited it by hand.
    """
    without_strings = re.sub(r'"(\\.|[^"\\])*"', '""', file.read_text(encoding="utf-8", errors="replace"))
    comments = re.findall("#.*", without_strings)
    groups = [f"# {group.name}" for group in fields(TrainConfig)]
    if comments and all(comment in groups for comment in comments):
        return
    if any((file.parent / name).exists() for name in (*RUN_FOLDERS, *RUN_FILES)):
        what = (
            f"it was edited: a run writes no comments but the groups' names ({', '.join(groups)}); copy your notes to "
            "another folder and restore these comments"
        )
    else:
        what = "no run wrote it; move it (--config takes it from any other folder)"
    raise OutputError(
        f"{file}: the run would replace it by its own settings, but {what}, or choose another --output_dir"
    )


def check_run_folder(output: Path) -> None:
    """Check that nothing lies where the run will write, or that the folder is a run's.

    Raises:
        OutputError: something does, with neither config.toml nor a checkpoint to show that a run wrote it.
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
    """Check that the run, which writes and deletes what `RUN_FOLDERS` and `RUN_FILES` name, keeps what it reads.

    resume_from: where it lies in the run's own folder, the run adds to the checkpoints there.

    Raises:
        OutputError: it would write over data, models or another run's checkpoint, or among them; or over files of
            which nothing shows that a run wrote them.
        CheckpointError: there is no checkpoint in `--init_experts_from`.
    """
    inputs, nested = flag_inputs(
        {f"--{name}": getattr(config.data, name) for name in ("train_json_path", "val_json_path")}
    )
    for name in ("pretrained_model_name_or_path", "pretrained_redux_model_name_or_path"):
        nested[f"--{name}"] = [Path(getattr(config.model, name)).expanduser()]
    inputs["--reward_functions"] = reward_module_paths(config.rollouts.reward_functions)
    if config.run.init_experts_from is not None:
        nested["--init_experts_from"] = [find_checkpoint(config.run.init_experts_from)]
    own = [(output / folder).resolve() for folder in (CHECKPOINT_DIR, BEST_DIR)] if is_run_folder(output) else []
    if resume_from is not None and resume_from.parent not in own:
        nested["--resume_from_checkpoint"] = [resume_from]
    check_outputs(run_outputs(output), inputs, nested)
    check_run_folder(output)
    if resume_from is not None and (output / METRICS_FILE).exists():
        read_rows(output / METRICS_FILE)  # the run goes on with these rows


def reward_module_paths(specs: Sequence[str]) -> list[Path]:
    """Where the modules of rewards `MODULE:FUNCTION=WEIGHT` may lie: in the working folder or on Python's path."""
    modules = [spec.partition(":")[0].strip().replace(".", "/") for spec in specs if ":" in spec]
    names = [name for module in modules for name in (f"{module}.py", f"{module}/__init__.py")]
    return [Path(folder, name) for folder in ("", *sys.path) for name in names]


def check_config_kept(config: TrainConfig, file: Path) -> None:
    """Check that the run neither replaces nor deletes the file of `--config`.

    A run's own config.toml is an exception: it is written again with the settings that were read from it, so that
    `--config` with the file can resume (`check_config_unedited` keeps any other config.toml).

    Raises:
        OutputError: the run would.
    """
    check_outputs(run_outputs(Path(config.run.output_dir), (*RUN_FILES, PREVIOUS_CONFIG)), {"--config": [file]})


def run_outputs(output: Path, files: Sequence[str] = (*RUN_FILES, CONFIG_FILE, PREVIOUS_CONFIG)) -> Outputs:
    """All that a run writes into its folder `output`: these files, and its folders."""
    return Outputs("--output_dir", output, [output / name for name in files], [output / name for name in RUN_FOLDERS])


def check_seed(checkpoint: Path, seed: int) -> None:
    """Raise ConfigError where the checkpoint's run began with another seed."""
    began = read_metadata(checkpoint).config["seed"]
    if seed != began:
        raise ConfigError(
            f"seed {seed}: checkpoint {checkpoint} began with seed {began}, and goes on with its data order and random "
            f"draws; give --seed {began}, or begin a new run in another --output_dir"
        )


def prepare_output_dir(config: TrainConfig, output: Path, *, keep: bool) -> None:
    """Make the folder and write the resolved configuration; with --overwrite_output_dir an old run's files are deleted.

    config.toml is replaced, not deleted: where the program is killed in between, the folder still holds a run. Where it
    says other settings, be they an earlier run's or edited by hand, config.toml.before keeps them.

    How this run began (anew, over another, resumed, with whose experts) is left out of it, so that `--config` with the
    file can resume.
    """
    if not keep and config.run.overwrite_output_dir and is_run_folder(output):
        for path in (output / name for name in (*RUN_FOLDERS, *RUN_FILES)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    beginnings = {"overwrite_output_dir": False, "resume_from_checkpoint": None, "init_experts_from": None}
    lasting = replace(config, run=replace(config.run, **beginnings))
    file, settings = output / CONFIG_FILE, to_toml(lasting).encode()
    if file.is_file() and (former := file.read_bytes()) != settings:
        write_file(output / PREVIOUS_CONFIG, former)
        log.warning("%s says other settings than this run's: kept as %s", file, output / PREVIOUS_CONFIG)
    write_file(file, settings)


def initial_params(config: TrainConfig, loaded: LoadedModel) -> Weights:
    """What training begins with: fresh weights, or another run's experts and router (averaged where it averaged)."""
    if config.run.init_experts_from is None:
        return loaded.trainable
    checkpoint = find_checkpoint(config.run.init_experts_from)
    metadata = read_metadata(checkpoint)
    check_base(checkpoint, metadata, loaded.fingerprint)
    log.info("beginning with the experts of %s", checkpoint)
    return restore(checkpoint, loaded.trainable, prefix="ema" if metadata.config["ema_decay"] else "trainable")


def restore_state(checkpoint: Path, state: TrainState, base: str, config: TrainConfig) -> tuple[TrainState, int]:
    """The checkpoint's state, and how many steps it has taken. Refuses another base or geometry.

    Another --policy_temperature than the checkpoint's run had takes effect; with another batch size or precision the
    run goes on, and says that its numbers will differ.
    """
    metadata = read_metadata(checkpoint)
    check_base(checkpoint, metadata, base)
    given = to_flat_dict(config)
    for name, differs in RESUME_WARNINGS.items():
        before = metadata.config.get(name, given[name])  # older checkpoints do not know every flag
        if given[name] != before:
            log.warning(
                "%s is %s, the checkpoint's was %s: the run goes on, but %s", name, given[name], before, differs
            )
    log.info("resuming from %s", checkpoint)
    state = restore(checkpoint, state)
    if given["policy_temperature"] not in ("auto", metadata.config["policy_temperature"]):
        state = replace(state, temperature=jnp.asarray(given["policy_temperature"], state.temperature.dtype))
    return state, metadata.position
