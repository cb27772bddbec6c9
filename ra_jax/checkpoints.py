"""Orbax checkpoints of a run: the train state, the data position, the configuration and the base's fingerprint.

A checkpoint is a folder `checkpoints/<step>` with two items. `state` has one array for each leaf of the train state,
and each array has the path of its leaf as its name. The frozen base is never saved. `about` is JSON
(`CheckpointMetadata`). Saving is asynchronous: a folder gets its final name only when it is complete.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ra_jax.errors import CheckpointError
from ra_jax.parallel.partitioning import named_leaves
from ra_jax.parallel.processes import barrier, is_main_process

log = logging.getLogger(__name__)

CHECKPOINT_DIR = "checkpoints"
BEST_DIR = "best"  # holds the checkpoint of the best look of a run, in the same format

# Parts of a state: name in code -> name on disk, if the two differ. The names on disk are the same in all releases, so
# that each release can read the checkpoints of all other releases.
NAMES_ON_DISK = {"old_params": "snapshot"}


@dataclass(frozen=True)
class CheckpointMetadata:
    """The metadata of a checkpoint.

    Attributes:
        position: number of the next global batch.
        base: fingerprint of the frozen base.
        config: the run's settings by flag name.
        geometry: shape and dtype of every leaf, by its name on disk.
    """

    position: int
    base: str
    config: dict[str, Any]
    geometry: dict[str, list]


def leaves_on_disk(tree: Any, prefix: str = "") -> dict[str, jax.Array]:
    """Return the leaves of a state by name on disk, such as "trainable/flux/transformer_blocks/attn/to_q/lora_a".

    `prefix` is the name of the part of the state that `tree` is, such as "trainable" or "ema/flux"; "" for the whole
    state.
    """
    part = prefix and prefix + "/"
    return {name_on_disk(part + name): leaf for name, leaf in named_leaves(tree).items()}


def name_on_disk(name: str) -> str:
    """Return the name on disk of a leaf or a part of a state, such as "snapshot/router" for "old_params/router"."""
    part, separator, rest = name.partition("/")
    return NAMES_ON_DISK.get(part, part) + separator + rest


def geometry(leaves: Mapping[str, Any]) -> dict[str, list]:
    """Return the shape and dtype of every leaf, in a form that JSON can store."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}


def checkpoint_bytes(state: Any) -> int:
    """Return the size of a checkpoint's arrays in bytes; Orbax compresses them, so that its files may be smaller."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


class Checkpoints:
    """The checkpoints in one folder of a run. Only the newest `limit` checkpoints are kept; all of them for None.

    Checkpoints that are not complete are renamed to `<step>.broken`, because Orbax would count them.
    """

    def __init__(self, output_dir: str | Path, *, folder: str = CHECKPOINT_DIR, limit: int | None = None):
        self.folder = Path(output_dir).resolve() / folder
        if is_main_process():
            _set_broken_aside(self.folder)
        barrier("checkpoints are complete")  # Orbax lists them on every process
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=limit, cleanup_tmp_directories=True),
            item_names=("state", "about"),
        )

    def save(self, step: int, state: Any, *, position: int, config: dict, base: str) -> None:
        """Start to save the state after `step` steps, and return when the arrays have been copied from the device.

        If this step is already saved, do nothing.

        Args:
            step: number of steps done.
            state: the train state.
            position: number of the next global batch.
            config: the run's settings by flag name.
            base: fingerprint of the frozen base.
        """
        if step in self._manager.all_steps():
            return
        leaves = leaves_on_disk(state)
        metadata = {"position": position, "base": base, "config": config, "geometry": geometry(leaves)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_orbax_names(leaves)), about=ocp.args.JsonSave(metadata)
            ),
        )

    def latest(self) -> Path | None:
        """Wait for saves in progress, and return the folder of the newest checkpoint; None if there is none."""
        self._manager.wait_until_finished()
        step = self._manager.latest_step()
        return None if step is None else self.folder / str(step)

    def close(self) -> None:
        """Wait for saves in progress, then release the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def _orbax_names(leaves: dict[str, Any]) -> dict[str, Any]:
    """Replace "/" in leaf names by ".", because Orbax treats "/" as a separator."""
    return {name.replace("/", "."): leaf for name, leaf in leaves.items()}


def find_checkpoint(where: str | Path, *, prefer_best: bool = False) -> Path:
    """Find a checkpoint, and return its resolved path. Links are followed.

    A checkpoint without its metadata, its manifest or its data is skipped, with a warning if it would have been the
    result. A process that is killed while it deletes a checkpoint can leave such a folder.

    Args:
        where: the checkpoint itself, the output folder of a run, or the folder `checkpoints` or `best` in an output
            folder. If there are several checkpoints, the latest is returned.
        prefer_best: in an output folder, prefer the checkpoint in `best`, to use the weights. Without it, the latest
            checkpoint in either folder is returned, to continue the run.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    path = Path(where).resolve()
    if is_checkpoint(path):
        return path
    parents = [path / folder for folder in (CHECKPOINT_DIR, BEST_DIR) if (path / folder).is_dir()]
    # `where` is a folder of checkpoints if it has the name of one, or if it is a link to a folder with such a name.
    if not parents and {path.name, Path(where).name} & {CHECKPOINT_DIR, BEST_DIR}:
        parents = [path]
    folders = [folder for parent in parents for folder in steps_in(parent)]
    broken = [folder for folder in folders if not _is_complete(folder)]
    steps = [folder for folder in folders if folder not in broken]
    if not steps:
        reason = f"; {', '.join(map(str, broken))}: files are missing" if broken else ""
        raise CheckpointError(
            f"no checkpoint in {where}: expected a run's output folder (with {CHECKPOINT_DIR}/<step> in it) or "
            f"one such checkpoint folder{reason}"
        )

    def rank(folder: Path) -> tuple[bool, int, bool]:
        return prefer_best and folder.parent.name == BEST_DIR, step_of(folder), folder.parent.name != BEST_DIR

    chosen = max(steps, key=rank)
    for folder in broken:
        if rank(folder) > rank(chosen):
            log.warning("%s: files of this checkpoint are missing; using %s", folder, chosen)
    return chosen.resolve()


def steps_in(parent: Path) -> list[Path]:
    """List the checkpoints `<step>` in a folder, also those that are not complete."""
    return [folder for folder in parent.glob("*") if folder.name.isdecimal()]


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint `<step>`."""
    return int(checkpoint.name)


def complete_steps(parent: Path) -> set[int]:
    """Return the steps of the complete checkpoints in a folder."""
    return {step_of(folder) for folder in steps_in(parent) if _is_complete(folder)}


def _is_complete(folder: Path) -> bool:
    return all(any(folder.glob(files)) for files in ("about/metadata", "state/manifest.ocdbt", "state/d/*"))


def _set_broken_aside(parent: Path) -> None:
    for folder in steps_in(parent):
        if not _is_complete(folder):
            names = (folder.with_name(f"{folder.name}.broken{number or ''}") for number in count())
            target = next(name for name in names if not name.exists())
            folder.rename(target)
            log.warning("%s is not complete, and is now %s", folder, target)


def is_checkpoint(folder: Path) -> bool:
    """Return whether the folder has the two items of a checkpoint."""
    return (folder / "about").is_dir() and (folder / "state").is_dir()


def enclosing_checkpoint(path: Path) -> Path | None:
    """Return the checkpoint, or the folder of checkpoints, that `path` is or is inside; None if there is none."""
    for folder in (path.resolve(), *path.resolve().parents):
        if is_checkpoint(folder) or (
            folder.name in (CHECKPOINT_DIR, BEST_DIR) and any(map(is_checkpoint, folder.glob("*")))
        ):
            return folder
    return None


def read_metadata(checkpoint: Path) -> CheckpointMetadata:
    """Read the metadata of a checkpoint folder; raises CheckpointError if it cannot be read."""
    with _reading(checkpoint), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return CheckpointMetadata(**reader.restore(checkpoint / "about"))


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Context manager that replaces the errors of a checkpoint that is broken by one that says so."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} cannot be read, files of it are missing or damaged: {str(error)[:500]}\n"
            "Copy it again, or use another checkpoint of its run."
        ) from error


def check_base(checkpoint: Path, metadata: CheckpointMetadata, fingerprint: str) -> None:
    """Raise CheckpointError if the checkpoint was trained on another base than the one with this fingerprint.

    `metadata` is the metadata of `checkpoint` (`read_metadata`).
    """
    if metadata.base != fingerprint:
        raise CheckpointError(
            f"checkpoint {checkpoint} was trained on another base (fingerprint {metadata.base}, this one has "
            f"{fingerprint}): give the Fill and Redux models that its run's config.toml names "
            "(--pretrained_model_name_or_path, --pretrained_redux_model_name_or_path)"
        )


def restore(checkpoint: Path, like: Any, *, prefix: str = "") -> Any:
    """Restore a checkpoint's arrays with the structure, shapes, dtypes and shardings of `like`.

    `like` is a pytree of arrays or ShapeDtypeStructs: the state of a run, or the part of the state that `prefix` names,
    such as "trainable".

    Raises CheckpointError if the checkpoint cannot be read, or has other leaves, shapes or dtypes. The message lists
    the differences.
    """
    on_disk = leaves_on_disk(like, prefix)
    expected, part = geometry(on_disk), prefix and name_on_disk(prefix) + "/"
    saved = {name: spec for name, spec in read_metadata(checkpoint).geometry.items() if name.startswith(part)}
    if expected != saved:
        raise CheckpointError(_describe_difference(checkpoint, expected, saved))
    checkpoint = checkpoint.resolve()  # Orbax requires an absolute path
    leaves, structure = jax.tree.flatten(like)
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
        for name, leaf in zip(expected, leaves, strict=True)
    }
    with _reading(checkpoint), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(
            checkpoint / "state",
            args=ocp.args.PyTreeRestore(
                item=_orbax_names(targets),
                restore_args=_orbax_names(ocp.checkpoint_utils.construct_restore_args(targets)),
                partial_restore=True,
            ),
        )
    return jax.tree.unflatten(structure, [restored[name.replace("/", ".")] for name in expected])


def _describe_difference(checkpoint: Path, expected: dict, saved: dict, limit: int = 10) -> str:
    lines = [f"{name}: this model has {expected[name]}, the checkpoint none" for name in expected.keys() - saved.keys()]
    lines += [f"{name}: only in the checkpoint" for name in saved.keys() - expected.keys()]
    lines += [
        f"{name}: this model has {expected[name]}, the checkpoint {saved[name]}"
        for name in expected.keys() & saved.keys()
        if expected[name] != saved[name]
    ]
    shown = "\n  ".join(sorted(lines)[:limit])
    more = f"\n  and {len(lines) - limit} more" if len(lines) > limit else ""
    return (
        f"checkpoint {checkpoint} has another geometry ({len(lines)} arrays differ):\n  {shown}{more}\n"
        "Use the model, --num_experts, --lora_rank, --target_modules, --optimizer and mode of the run that wrote it."
    )
