"""Folders of safetensors as diffusers and transformers write them: one file, or shards and an index."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

STEMS = ("diffusion_pytorch_model", "model")  # diffusers', transformers'
FLOATS = ("BF16", "F16", "F32", "F64")
SHARD_BYTES = 5 * 10**9  # also what is held in host memory while writing


class WeightError(ValueError):
    """Weights that cannot be found, read, or fitted to the model; the message is the whole report."""


class TensorFolder:
    """The tensors of a folder's safetensors files by name; nothing is read until `read`.

    Args:
        folder: holds `diffusion_pytorch_model.safetensors` or `model.safetensors`, or shards and their
            `….safetensors.index.json`.

    Raises:
        WeightError: if there is no such file, a shard is missing or damaged, or two shards hold the same tensor.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = {}
        for path in self._paths():
            try:
                file = safe_open(path, framework="np")
            except SafetensorError as error:
                raise WeightError(f"{path} cannot be read ({error}): download or write it again.") from error
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in self._files:
                    raise WeightError(f"{path} holds {name}, as another shard does: expected every tensor once.")
                self._files[name] = file

    def _paths(self) -> list[Path]:
        for stem in STEMS:
            index = self.folder / f"{stem}.safetensors.index.json"
            if index.is_file():
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                if absent := [shard for shard in shards if not (self.folder / shard).is_file()]:
                    raise WeightError(
                        f"{index} names shards that are not there: {', '.join(absent)}; the download is not complete."
                    )
                return [self.folder / shard for shard in shards]
            if (single := self.folder / f"{stem}.safetensors").is_file():
                return [single]
        raise WeightError(
            f"{self.folder} has no safetensors: expected one of "
            f"{', '.join(f'{stem}.safetensors' for stem in STEMS)}, or shards with an index beside them."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """One tensor in the file's type.

        Raises:
            WeightError: if it is not of floats that can be cast, as in quantised files.
        """
        kind = self._files[name].get_slice(name).get_dtype()
        if kind not in FLOATS:
            raise WeightError(
                f"{self.folder}: {name} is {kind}, expected one of {', '.join(FLOATS)}; take the bfloat16 files."
            )
        return self._files[name].get_tensor(name)


def write_tensors(folder: Path, stem: str, sizes: Mapping[str, int], read: Callable[[str], np.ndarray]) -> None:
    """Write tensors as `stem`.safetensors, or as shards of at most `SHARD_BYTES` and an index.

    Args:
        folder: made if it is not there; files of an earlier write with this stem are replaced.
        stem: one of `STEMS`.
        sizes: bytes of each tensor by name.
        read: a tensor by name; called once each, a shard's tensors at a time.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size

    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{stem}*.safetensors*"):
        stale.unlink()
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    else:
        files = [f"{stem}-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        # transformers refuses files that do not name a framework.
        save_file({name: read(name) for name in names}, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
