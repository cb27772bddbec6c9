"""Folders of weights, on disk or on the Hugging Face hub, and the fingerprint of what is in them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ra_jax.errors import WeightError

# Folders whose weights decide what a base model computes, and so its fingerprint.
COMPONENTS = ("transformer", "vae", "image_encoder", "image_embedder")


SAMPLES, SAMPLE_BYTES = 256, 1024  # evenly spaced in each file


def resolve(name_or_path: str | Path, subfolders: Sequence[str]) -> Path:
    """The folder of a pipeline: a local one as it is, or what `subfolders` of a hub repository hold, downloaded.

    Args:
        name_or_path: folder in diffusers' layout, or hub id such as "black-forest-labs/FLUX.1-Fill-dev".
        subfolders: what is needed of it, such as ("transformer", "vae", "scheduler"); nothing else is downloaded.

    Raises:
        WeightError: if a subfolder is missing, or the hub cannot give it; it says how to get access.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        folder = _download(str(name_or_path), subfolders)
    if absent := [name for name in subfolders if not (folder / name).is_dir()]:
        raise WeightError(
            f"{name_or_path} has no {'/, '.join(absent)}/: expected a model in diffusers' layout with "
            f"{'/, '.join(subfolders)}/."
        )
    return folder


def _download(repo_id: str, subfolders: Sequence[str]) -> Path:
    # Late: only those who name a hub id need it.
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
            f"pretrained model {repo_id!r}: there is no such folder here, and a hub id looks like owner/name. "
            f"Expected a folder in diffusers' layout with {'/, '.join(subfolders)}/; `python -m ra_jax.demo` makes "
            "those that configs/tiny.toml names."
        ) from None
    # Gated or missing, offline or disk full: the ways out are the same.
    except (HfHubHTTPError, OSError) as error:
        raise WeightError(
            f"pretrained model {repo_id!r} cannot be had: it is not a folder here, and the Hugging Face hub gave "
            f"{type(error).__name__}: {error}\n"
            f"Expected a folder in diffusers' layout with {'/, '.join(subfolders)}/, or a hub id. Either\n"
            f"  - accept the licence at https://huggingface.co/{repo_id} and run `hf auth login`,\n"
            "  - or download the model elsewhere and give its folder,\n"
            "  - or begin with the embedded tiny model, which needs no download: `python -m ra_jax.demo`, then\n"
            "    `python -m ra_jax.train --config configs/tiny.toml`."
        ) from error


def fingerprint(folder: str | Path, components: Sequence[str] = COMPONENTS) -> str:
    """A name for the weights in `folder` that changes when they do: 16 hexadecimal digits.

    It hashes the config.json of each component and, of each safetensors file, name, length, header and 256 samples
    of 1 KiB, so that 24 GB take a moment. A change confined to the bytes between samples is not seen.

    Raises:
        WeightError: if the folder holds no weights.
    """
    folder = Path(folder)
    files = [path for name in components for path in sorted((folder / name).glob("*.safetensors"))]
    if not files:
        raise WeightError(f"{folder} has no safetensors in any of {'/, '.join(components)}/.")
    digest = hashlib.sha256()
    for config in dict.fromkeys(path.with_name("config.json") for path in files):
        digest.update(config.read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header))
            for offset in np.linspace(8 + header, max(8 + header, size - SAMPLE_BYTES), SAMPLES, dtype=np.int64):
                file.seek(int(offset))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
