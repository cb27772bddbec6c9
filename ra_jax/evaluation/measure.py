"""The metrics of every pair: pixels, structure, rewards and networks; what cannot be computed is absent, never made up.

Each photo is measured at its own size, since padding or resizing would change gradients, windows and texture. The
compiled part is compiled once for each size; pictures of a size are measured one after the other.
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

SEAM = 4  # pixels on each side of the mask's edge
REGIONS = {"": "picture", "_mask": "mask", "_outside": "outside", "_seam": "seam"}  # suffix of the column: region
MAX_COMPILED_SIZES = (
    16  # sizes whose programs stay in memory, about 10 MB each; none is needed again once its size is done
)


@dataclass(frozen=True)
class Networks:
    """What measures by a network; None where the user has not asked for it, or has no weights.

    lpips: two pictures [h, w, 3] in [0, 1] -> distance or None; the others: RGB photo -> features [D].
    """

    lpips: Callable[[np.ndarray, np.ndarray], float | None] | None = None
    inception: Embed | None = None
    clip: Embed | None = None
    dino: Embed | None = None


@dataclass(frozen=True)
class Fid:
    """FID of all results and the distinct ground truths; `dimensions` of the features."""

    value: float
    results: int
    truths: int
    dimensions: int


class Evaluation:
    """Rows and FID of `pairs`. weights: of the three rewards in the total, in the order of `default_rewards`."""

    def __init__(self, pairs: Sequence[Pair], weights: Sequence[float], networks: Networks):
        self._pairs, self._weights, self._networks = pairs, weights, networks
        self._rows: dict[int, Row] = {}
        self._features: list[np.ndarray] = []  # of the results, by the Inception
        self._truth_features: dict[tuple[str, Path], np.ndarray] = {}  # by network: a scene's results share them

    def measure(self) -> Iterator[Pair]:
        """Measure every pair, yielding each as it is done; pictures of one size follow each other."""
        sizes: set = set()
        for i in sorted(range(len(self._pairs)), key=lambda i: (self._pairs[i].size, self._pairs[i].truth or Path())):
            pair = self._pairs[i]
            sizes.add(pair.size)
            if len(sizes) > MAX_COMPILED_SIZES:
                jax.clear_caches()
                sizes = {pair.size}
            self._rows[i] = self._row(pair)
            yield pair

    @property
    def rows(self) -> list[Row]:
        """A row a pair, in their order, as `table` describes it."""
        return [self._rows[i] for i in range(len(self._pairs))]

    def fid(self) -> Fid | None:
        """None without an Inception, or with fewer than two results or ground truths."""
        truths = [features for (network, _), features in self._truth_features.items() if network == "inception"]
        if min(len(self._features), len(truths)) < 2:
            return None
        results = np.stack(self._features)
        return Fid(frechet_distance(results, np.stack(truths)), len(results), len(truths), results.shape[1])

    def _row(self, pair: Pair) -> Row:
        photos = {name: read_photo(path) for name, path in (("src", pair.src), ("result", pair.result))}
        if pair.truth is not None:
            photos["truth"] = read_photo(pair.truth)
        values = measure_arrays(
            *(as_floats(photos[name]) for name in ("result", "src")),
            read_mask(pair.mask),
            as_floats(photos["truth"]) if pair.truth is not None else None,
            self._weights,
        )
        if pair.truth is not None:
            values |= self._by_networks(pair, photos["result"], photos["truth"])
        about = {"id": pair.id, "result": str(pair.result), "truth": None if pair.truth is None else str(pair.truth)}
        return about | {"height": pair.size[0], "width": pair.size[1]} | {k: _finite(v) for k, v in values.items()}

    def _by_networks(self, pair: Pair, result: Image.Image, truth: Image.Image) -> dict[str, float | None]:
        networks, values = self._networks, {}
        if networks.lpips is not None:
            values["lpips"] = networks.lpips(as_floats(result), as_floats(truth))
        for name, embed in (("clip_similarity", networks.clip), ("dino_similarity", networks.dino)):
            if embed is not None:
                values[name] = cosine_similarity(embed(result), self._of_truth(name, embed, pair, truth))
        if networks.inception is not None:
            self._features.append(networks.inception(result))
            self._of_truth("inception", networks.inception, pair, truth)
        return values

    def _of_truth(self, network: str, embed: Embed, pair: Pair, truth: Image.Image) -> np.ndarray:
        key = (network, pair.truth.resolve())
        if key not in self._truth_features:
            self._truth_features[key] = embed(truth)
        return self._truth_features[key]


def measure_arrays(
    result: np.ndarray, source: np.ndarray, mask: np.ndarray, truth: np.ndarray | None, weights: Sequence[float]
) -> dict[str, float | None]:
    """The metrics of one picture that need no network, by the names of `table.COLUMNS`.

    result, source, truth: [h, w, 3] float32 in [0, 1]; mask: [h, w] bool; weights: of the three rewards. PSNR is at
    most 100 dB, which is what equal pictures have; PSNR and SSIM of an empty region are None.
    """
    names = default_rewards(truth is not None)
    batch = [None if x is None else jnp.asarray(x, jnp.float32)[None] for x in (result, source, mask, truth)]
    scores, decibels, regions = jax.device_get(_scores_and_psnr(RewardInputs(*batch), names=names))
    regions = {name: region[0] > 0 for name, region in regions.items()}
    outside = regions["outside"].any()
    values = {
        "total_reward": float(total_reward(np.array([scores[name][0] for name in names]), weights)),
        **{name: float(scores[name][0]) for name in names},
        "mask_area": float(mask.mean()),
        "psnr_source_outside": float(decibels["source"][0]) if outside else None,
    }
    if truth is None:
        return values
    similarity = ssim_map(result, truth)
    for suffix, name in REGIONS.items():
        values[f"psnr{suffix}"] = float(decibels[name][0]) if regions[name].any() else None
        values[f"ssim{suffix}"] = mean_ssim(similarity, regions[name])
    return values


def as_floats(photo: Image.Image) -> np.ndarray:
    """[h, w, 3] float32 in [0, 1]."""
    return np.asarray(photo, np.float32) / np.float32(255.0)


@partial(jax.jit, static_argnames="names")
def _scores_and_psnr(inputs: RewardInputs, names: tuple[str, ...]):
    """Rewards by name, PSNR by region (of the result against the truth; "source": against the photo, outside), regions.

    Rewards and PSNR are [1]; regions [1, h, w] float32.
    """
    regions = {
        "picture": jnp.ones_like(inputs.mask),
        "mask": inputs.mask,
        "outside": 1.0 - inputs.mask,
        "seam": seam_band(inputs.mask, SEAM),
    }
    scores = {name: REWARDS[name].function(inputs) for name in names}
    decibels = {"source": psnr(inputs.image, inputs.source, regions["outside"])}
    if inputs.target is not None:
        decibels |= {name: psnr(inputs.image, inputs.target, region) for name, region in regions.items()}
    return scores, decibels, regions


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
