"""The folder of a run: what a run writes there, and the checks that it neither replaces nor deletes anything else."""

import logging
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from ra_jax.checkpoints import BEST_DIR, CHECKPOINT_DIR, find_checkpoint, steps_in
from ra_jax.config.parse import from_checkpoint, load_toml, to_flat_dict, to_toml
from ra_jax.config.settings import TrainConfig
from ra_jax.data.inputs import flag_inputs
from ra_jax.errors import ConfigError, OutputError
from ra_jax.outputs import Outputs, check_outputs, write_file
from ra_jax.reporting.trackers import METRICS_FILE, read_rows

log = logging.getLogger(__name__)

CONFIG_FILE = "config.toml"
PREVIOUS_CONFIG = "config.toml.before"  # copy of the last config.toml that a run replaced by other settings
# Everything else that a run writes into its folder. All other files there belong to the user.
REFERENCE_DIR = "reference"
RUN_FOLDERS = (CHECKPOINT_DIR, BEST_DIR, REFERENCE_DIR, "previews", "tensorboard", "wandb")
RUN_FILES = (METRICS_FILE, "curves.png", "report.html")


def is_run_folder(output: Path) -> bool:
    """Return whether the folder holds a run, that is, a config.toml or a checkpoint.

    A checkpoint in another folder does not count, even if a link in this folder leads to it.
    """
    if (output / CONFIG_FILE).is_file():
        return True
    checkpoints = [step for folder in (CHECKPOINT_DIR, BEST_DIR) for step in steps_in(output / folder)]
    return any(checkpoint.resolve().is_relative_to(output.resolve()) for checkpoint in checkpoints)


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
    if config.run.init_experts_from is not None and resume_from is None:
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


def prepare_output_dir(config: TrainConfig, output: Path, *, keep: bool) -> None:
    """Create the output folder and write the configuration with all defaults to its config.toml.

    With --overwrite_output_dir, the files of an earlier run are deleted first, unless `keep` is True. config.toml is
    replaced and not deleted, so that the folder still counts as a run if the process is killed in between. If an
    existing config.toml has other settings, it is first copied to config.toml.before.

    --overwrite_output_dir and --resume_from_checkpoint are not written, so that `--config` with this file can resume
    the run.
    """
    if not keep and is_run_folder(output):
        # A run that was stopped before its first checkpoint starts again: with a new copy of its reference.
        names = (*RUN_FOLDERS, *RUN_FILES) if config.run.overwrite_output_dir else (REFERENCE_DIR,)
        for path in (output / name for name in names):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    config = replace(config, run=replace(config.run, overwrite_output_dir=False, resume_from_checkpoint=None))
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
