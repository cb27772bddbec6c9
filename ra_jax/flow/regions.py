"""Where a loss is taken: the mean over a region, mean_Ω, as weights over the packed latents of a diptych.

Ω is the right panel, the photo. M, the edited region, is its mask dilated by 2 latent cells. Masks cover 0.4–72 % of a
photo, so that a plain mean over the panel moves a hundred times more for one scene than for another; `balanced` gives
the edited region and the rest of the photo half the weight each.
"""

import jax
import jax.numpy as jnp

from ra_jax.models.conditioning import pack

LOSS_REGIONS = ("balanced", "panel", "mask", "all")
DILATION = 2  # latent cells


def _normalized(region: jax.Array) -> jax.Array:
    """Weights [B, h, w] that sum to 1 over a region, or to 0 where the region is empty."""
    return region / jnp.maximum(region.sum((1, 2), keepdims=True), 1.0)


def region_weights(mask: jax.Array, factor: int, kind: str = "balanced") -> jax.Array:
    """Weights over packed latents that turn a sum into mean_Ω.

    mask: [B, H, W] of the whole diptych in pixels (0 on the left panel), 1 = edited; factor: the VAE's f.
    Returns [B, N, 4], one weight for each latent cell of a token in the order (row, column); each image sums to 1.
    `balanced` = ½·mean over M + ½·mean over the rest of the right panel (all of it on M where M is the whole panel).
    """
    b, h, w = mask.shape
    cells = mask.reshape(b, h // factor, factor, w // factor, factor).max((2, 4))
    size = 2 * DILATION + 1
    edited = jax.lax.reduce_window(cells, -jnp.inf, jax.lax.max, (1, size, size), (1, 1, 1), "SAME")
    panel = jnp.broadcast_to(jnp.arange(w // factor) >= w // factor // 2, cells.shape).astype(jnp.float32)
    edited = (edited > 0) * panel
    if kind == "balanced":
        rest = _normalized(panel - edited)
        share = 1.0 - 0.5 * rest.sum((1, 2), keepdims=True)
        weights = share * _normalized(edited) + 0.5 * rest
    elif kind == "panel":
        weights = _normalized(panel)
    elif kind == "mask":
        weights = _normalized(edited)
    elif kind == "all":
        weights = _normalized(jnp.ones_like(panel))
    else:
        raise ValueError(f"loss_region={kind!r}: expected one of {', '.join(LOSS_REGIONS)}")
    return pack(weights[..., None])


def region_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """mean_Ω of `values` [B, N, 4C] (packed, channel-major) under `region_weights` [B, N, 4]; returns [B], float32."""
    b, n, features = values.shape
    by_cell = values.astype(jnp.float32).reshape(b, n, features // 4, 4).mean(2)
    return (by_cell * weights).sum((1, 2))
