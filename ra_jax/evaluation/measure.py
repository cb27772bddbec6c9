"""The metrics of every pair: rewards, PSNR, SSIM, and metrics that networks compute.

A metric that cannot be computed is None or missing in the row. Each photo is measured at its own size, because padding
or resizing would change gradients, SSIM windows and texture. JAX compiles one program for each size. Therefore images
of the same size are measured one after the other.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ra_jax.data.images import read_mask, read_photo
from ra_jax.evaluation.pairs import Pair
from ra_jax.evaluation.perceptual import Embed, cosine_similarity, frechet_distance
from ra_jax.evaluation.structural import mean_ssim, ssim_map
from ra_jax.evaluation.table import Row
from ra_jax.rewards.image_metrics import psnr, seam_band
from ra_jax.rewards.registry import REWARDS, RewardInputs, default_rewards, total_reward

SEAM_WIDTH = 4  # pixels: the seam is the band of this width on each side of the mask's edge
# Suffix of a column -> the region that the column is computed in.
REGION_BY_SUFFIX = {"": "image", "_mask": "mask", "_outside": "outside", "_seam": "seam"}
# Number of image sizes whose compiled programs stay in memory, about 10 MB each. Images are measured in order of size,
# so that the programs of earlier sizes are not needed again.
MAX_COMPILED_SIZES = 16


@dataclass(frozen=True)
class Networks:
    """The networks to measure with; None for a network that the user has not asked for.

    Attributes:
        lpips: two images [h, w, 3] in [0, 1] -> distance, or None if they are too small.
        inception: RGB photo -> features [D], for FID.
        clip: RGB photo -> features [D], for `clip_similarity`.
        dino: RGB photo -> features [D], for `dino_similarity`.
    """

    lpips: Callable[[np.ndarray, np.ndarray], float | None] | None = None
    inception: Embed | None = None
    clip: Embed | None = None
    dino: Embed | None = None


@dataclass(frozen=True)
class Fid:
    """FID between all results and all distinct ground truths.

    Attributes:
        value: the Fréchet distance, ≥ 0.
        results: the number of results.
        truths: the number of distinct ground truths.
        dimensions: the number of features of an image.
    """

    value: float
    results: int
    truths: int
    dimensions: int


class Evaluation:
    """Evaluation of results: one row of metrics for each pair, and the FID.

    Args:
        pairs: the results with their photos, masks and ground truths.
        weights: the weights of the three rewards in `total_reward`, in the order of `default_rewards`.
        networks: the networks to measure with, if there is ground truth.
    """

    def __init__(self, pairs: Sequence[Pair], weights: Sequence[float], networks: Networks):
        self._pairs, self._weights, self._networks = pairs, weights, networks
        self._rows: dict[int, Row] = {}
        self._result_features: list[np.ndarray] = []  # Inception features of the results
        # (network, ground truth) -> features. All results of a scene have the same ground truth, so the features are
        # computed only once.
        self._truth_features: dict[tuple[str, Path], np.ndarray] = {}

    def measure(self) -> Iterator[Pair]:
        """Measure all pairs in order of image size, and yield each pair after its measurement."""
        compiled_sizes: set = set()
        for i in sorted(range(len(self._pairs)), key=lambda i: (self._pairs[i].size, self._pairs[i].truth or Path())):
            pair = self._pairs[i]
            compiled_sizes.add(pair.size)
            if len(compiled_sizes) > MAX_COMPILED_SIZES:
                jax.clear_caches()
                compiled_sizes = {pair.size}
            self._rows[i] = self._measure_pair(pair)
            yield pair

    @property
    def rows(self) -> list[Row]:
        """One row for each pair, in the order of the pairs, with the columns of `table`.

        The rows are complete only after the iterator of `measure` has ended.
        """
        return [self._rows[i] for i in range(len(self._pairs))]

    def fid(self) -> Fid | None:
        """Compute the FID; None if there is no Inception network, or fewer than two results or ground truths."""
        truths = [features for (network, _), features in self._truth_features.items() if network == "inception"]
        if min(len(self._result_features), len(truths)) < 2:
            return None
        results = np.stack(self._result_features)
        return Fid(frechet_distance(results, np.stack(truths)), len(results), len(truths), results.shape[1])

    def _measure_pair(self, pair: Pair) -> Row:
        photos = {name: read_photo(path) for name, path in (("src", pair.src), ("result", pair.result))}
        if pair.truth is not None:
            photos["truth"] = read_photo(pair.truth)
        metrics = measure_arrays(
            *(as_floats(photos[name]) for name in ("result", "src")),
            read_mask(pair.mask),
            as_floats(photos["truth"]) if pair.truth is not None else None,
            self._weights,
        )
        if pair.truth is not None:
            metrics |= self._measure_by_networks(pair, photos["result"], photos["truth"])
        info = {"id": pair.id, "result": str(pair.result), "truth": None if pair.truth is None else str(pair.truth)}
        info |= {"height": pair.size[0], "width": pair.size[1]}
        return info | {name: _finite_or_none(value) for name, value in metrics.items()}

    def _measure_by_networks(self, pair: Pair, result: Image.Image, truth: Image.Image) -> dict[str, float | None]:
        networks, metrics = self._networks, {}
        if networks.lpips is not None:
            metrics["lpips"] = networks.lpips(as_floats(result), as_floats(truth))
        for name, embed in (("clip_similarity", networks.clip), ("dino_similarity", networks.dino)):
            if embed is not None:
                metrics[name] = cosine_similarity(embed(result), self._embed_truth(name, embed, pair, truth))
        if networks.inception is not None:
            self._result_features.append(networks.inception(result))
            self._embed_truth("inception", networks.inception, pair, truth)
        return metrics

    def _embed_truth(self, network: str, embed: Embed, pair: Pair, truth: Image.Image) -> np.ndarray:
        key = (network, pair.truth.resolve())
        if key not in self._truth_features:
            self._truth_features[key] = embed(truth)
        return self._truth_features[key]


def measure_arrays(
    result: np.ndarray, source: np.ndarray, mask: np.ndarray, truth: np.ndarray | None, weights: Sequence[float]
) -> dict[str, float | None]:
    """Compute the metrics of one result that need no network, by their names in `table.COLUMNS`.

    PSNR is at most 100 dB, which is the PSNR of equal images. PSNR in an empty region is None. SSIM in a region is None
    if no window is centered in the region.

    Args:
        result: [h, w, 3] float32 in [0, 1].
        source: the photo, [h, w, 3] float32 in [0, 1].
        mask: [h, w] bool, True = remove.
        truth: the ground truth, [h, w, 3] float32 in [0, 1], or None.
        weights: the weights of the three rewards in `total_reward`.
    """
    names = default_rewards(truth is not None)
    batch = [None if x is None else jnp.asarray(x, jnp.float32)[None] for x in (result, source, mask, truth)]
    scores, psnr_values, regions = jax.device_get(_scores_and_psnr(RewardInputs(*batch), names=names))
    regions = {name: region[0] > 0 for name, region in regions.items()}
    has_outside = regions["outside"].any()
    metrics = {
        "total_reward": float(total_reward(np.array([scores[name][0] for name in names]), weights)),
        **{name: float(scores[name][0]) for name in names},
        "mask_area": float(mask.mean()),
        "psnr_source_outside": float(psnr_values["source"][0]) if has_outside else None,
    }
    if truth is None:
        return metrics
    ssim_values = ssim_map(result, truth)
    for suffix, name in REGION_BY_SUFFIX.items():
        metrics[f"psnr{suffix}"] = float(psnr_values[name][0]) if regions[name].any() else None
        metrics[f"ssim{suffix}"] = mean_ssim(ssim_values, regions[name])
    return metrics


def as_floats(photo: Image.Image) -> np.ndarray:
    """Convert a photo to [h, w, 3] float32 in [0, 1]."""
    return np.asarray(photo, np.float32) / np.float32(255.0)


@partial(jax.jit, static_argnames="names")
def _scores_and_psnr(inputs: RewardInputs, names: tuple[str, ...]):
    """Compute the rewards by name [1], PSNR by region [1], and the regions [1, h, w] float32.

    If there is a ground truth, PSNR compares the result with it in each region. The PSNR named "source" compares the
    result with the photo outside the mask.
    """
    regions = {
        "image": jnp.ones_like(inputs.mask),
        "mask": inputs.mask,
        "outside": 1.0 - inputs.mask,
        "seam": seam_band(inputs.mask, SEAM_WIDTH),
    }
    scores = {name: REWARDS[name].function(inputs) for name in names}
    psnr_values = {"source": psnr(inputs.image, inputs.source, regions["outside"])}
    if inputs.target is not None:
        psnr_values |= {name: psnr(inputs.image, inputs.target, region) for name, region in regions.items()}
    return scores, psnr_values, regions


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
