"""Read and write folders of safetensors files in diffusers' layout: a single file, or shards and an index."""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy, where safetensors looks it up)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ra_jax.errors import WeightError
from ra_jax.outputs import replace_file

STEMS = ("diffusion_pytorch_model", "model")  # names of weight files without suffix, in diffusers and in transformers
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
SHARD_BYTES = 5 * 10**9  # also the host memory needed for writing, because a shard is written in one piece


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, as the file's header describes it.

    Attributes:
        file: the safetensors file.
        name: name of the tensor in the file.
        shape: shape of the tensor.
        dtype_name: safetensors' name of the dtype, such as "BF16".
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype_name: str

    def read(self) -> np.ndarray:
        """Return the tensor in its dtype in the file, which must be one of `FLOAT_DTYPES`."""
        # The file is opened for this tensor only. If it stayed mapped, all pages read so far would count as memory use.
        with safe_open(self.file, framework="np") as tensors:
            return tensors.get_tensor(self.name)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors in a folder's safetensors files by name, without reading their values.

    Args:
        folder: contains `diffusion_pytorch_model.safetensors` or `model.safetensors`. Instead of this file, it may
            contain shards and an index, `diffusion_pytorch_model.safetensors.index.json` or
            `model.safetensors.index.json`.

    Raises:
        WeightError: there is no such file, a shard is missing, a file is damaged, or two shards have the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _tensor_files(folder):
        try:
            with safe_open(file, framework="np") as header:
                slices = {name: header.get_slice(name) for name in header.keys()}  # noqa: SIM118 (not a dict)
                stored = [StoredTensor(file, n, tuple(x.get_shape()), x.get_dtype()) for n, x in slices.items()]
        except SafetensorError as error:
            raise WeightError(f"{file} could not be read ({error}): download or write it again.") from error
        for tensor in stored:
            if (earlier := tensors.setdefault(tensor.name, tensor)) is not tensor:
                raise WeightError(
                    f"{file} and {earlier.file.name} both hold the tensor {tensor.name}: expected it in one file only; "
                    "download or write the files again."
                )
    return tensors


def _tensor_files(folder: Path) -> list[Path]:
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError) as error:
                raise WeightError(f"{index} could not be read ({error!r}): expected JSON with weight_map.") from error
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise WeightError(
                    f"{index} lists shards that do not exist: {', '.join(missing)}; complete the download."
                )
            return [folder / shard for shard in shards]
        if (single := folder / f"{stem}.safetensors").is_file():
            return [single]
    raise WeightError(
        f"{folder} has no safetensors file: expected {' or '.join(f'{stem}.safetensors' for stem in STEMS)}, "
        "or shards with an index."
    )


def write_tensors(folder: Path, stem: str, sizes: Mapping[str, int], read: Callable[[str], np.ndarray]) -> None:
    """Write tensors to `stem`.safetensors or, if they exceed `SHARD_BYTES` in total, to shards and an index.

    A shard has at most `SHARD_BYTES`, unless a single tensor is larger. Files that an earlier call wrote with the same
    stem are replaced or deleted.

    Args:
        folder: folder to write to. It is created if it does not exist.
        stem: one of `STEMS`.
        sizes: size in bytes of each tensor, by name.
        read: returns a tensor by name. It is called once per tensor. All tensors of a shard are in memory together.
    """
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, size in sizes.items():
        if shards[-1] and shard_bytes + size > SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size

    index = f"{stem}.safetensors.index.json"
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    else:
        files = [f"{stem}-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    folder.mkdir(parents=True, exist_ok=True)
    # At the end of this block, the drafts are renamed in reverse order. The index is entered first, so it is renamed
    # last, when all shards exist.
    with ExitStack() as drafts:
        if len(files) > 1:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            drafts.enter_context(replace_file(folder / index)).write_text(json.dumps(content, indent=2))
        for file, names in zip(files, shards, strict=True):
            draft = drafts.enter_context(replace_file(folder / file))
            # transformers rejects files whose metadata does not name a framework.
            save_file({name: read(name) for name in names}, draft, metadata={"format": "pt"})
    written = {*files, index} if len(files) > 1 else set(files)
    # An old index is deleted before the old shards, so that it never names shards that do not exist.
    stale = [file for file in (index, *_existing_files(folder, stem)) if file not in written]
    for file in stale:
        (folder / file).unlink(missing_ok=True)


def _existing_files(folder: Path, stem: str) -> list[str]:
    """Return the names of all files in the folder that are a single file or a shard with this stem."""
    name = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    return [path.name for path in folder.iterdir() if name.fullmatch(path.name)]
