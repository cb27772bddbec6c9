"""Find folders of weights on disk or download them from the Hugging Face hub, and compute fingerprints of weights."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ra_jax.errors import WeightError

# Subfolders whose weights determine the output of a base model. The fingerprint of a base covers only these.
WEIGHT_SUBFOLDERS = ("transformer", "vae", "image_encoder", "image_embedder")


CHUNKS, CHUNK_BYTES = 256, 1024  # number and size of the evenly spaced chunks that are hashed in each file


def resolve_folder(name_or_path: str | Path, subfolders: Sequence[str]) -> Path:
    """Return the folder of a pipeline on disk; a folder on the hub is downloaded first.

    Args:
        name_or_path: folder in diffusers' layout, or hub id such as "black-forest-labs/FLUX.1-Fill-dev".
        subfolders: subfolders that the folder must have, such as ("transformer", "vae", "scheduler"). Only these are
            downloaded.

    Raises:
        WeightError: a subfolder is missing, or the download failed. The message explains how to get access.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        folder = _download(str(name_or_path), subfolders)
    if missing := [name for name in subfolders if not (folder / name).is_dir()]:
        raise WeightError(
            f"{name_or_path} has no {'/, '.join(missing)}/: expected a model in diffusers' layout with "
            f"{'/, '.join(subfolders)}/."
        )
    return folder


def _download(repo_id: str, subfolders: Sequence[str]) -> Path:
    # Imported here because only hub ids need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                repo_id,
                allow_patterns=[f"{name}/*" for name in subfolders],
                ignore_patterns=["*.bin", "*.msgpack", "*.onnx*", "*.h5"],
            )
        )
    except HFValidationError:
        raise WeightError(
            f"pretrained model {repo_id!r}: this folder does not exist, and the name is not a hub id (OWNER/NAME). "
            f"Expected a folder in diffusers' layout with {'/, '.join(subfolders)}/; `python -m ra_jax.demo` creates "
            "the folders that configs/tiny.toml names."
        ) from None
    # The same advice fits a gated repository, a missing repository, a missing network and a full disk.
    except (HfHubHTTPError, OSError) as error:
        raise WeightError(
            f"pretrained model {repo_id!r} could not be loaded: this folder does not exist, and the download from the "
            f"Hugging Face hub failed with {type(error).__name__}: {error}\n"
            f"Expected a folder in diffusers' layout with {'/, '.join(subfolders)}/, or a hub id. Either\n"
            f"  - accept the license at https://huggingface.co/{repo_id} and run `hf auth login`,\n"
            "  - or download the model on another machine and pass its folder,\n"
            "  - or start with the tiny demo model, which needs no download: run `python -m ra_jax.demo`, then\n"
            "    `python -m ra_jax.train --config configs/tiny.toml`."
        ) from error


def fingerprint(folder: str | Path, components: Sequence[str] = WEIGHT_SUBFOLDERS) -> str:
    """Compute a fingerprint of the weights in `folder`: 16 hexadecimal digits that change when the weights change.

    The hash covers the config.json of each component. For each safetensors file, it covers name, length, header and
    256 evenly spaced chunks of 1 KiB, so that 24 GB take only a moment. The fingerprint does not notice a change that
    lies entirely between the chunks.

    Args:
        folder: folder of a pipeline.
        components: subfolders whose weights are hashed; missing ones are skipped.

    Raises:
        WeightError: no component has a safetensors file.
    """
    folder = Path(folder)
    files = [path for name in components for path in sorted((folder / name).glob("*.safetensors"))]
    if not files:
        raise WeightError(
            f"{folder} has no .safetensors files: expected a model in diffusers' layout with weights in at least one "
            f"of {'/, '.join(components)}/."
        )
    digest = hashlib.sha256()
    for config in dict.fromkeys(path.with_name("config.json") for path in files):
        digest.update(config.read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}".encode())
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header_bytes))
            start = 8 + header_bytes
            for offset in np.linspace(start, max(start, size - CHUNK_BYTES), CHUNKS, dtype=np.int64):
                file.seek(int(offset))
                digest.update(file.read(CHUNK_BYTES))
    return digest.hexdigest()[:16]
