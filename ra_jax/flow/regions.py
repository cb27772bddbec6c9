"""The mean of a loss over a region Ω of a diptych, mean_Ω, computed with weights over packed latents.

Ω is usually the right panel, which is the photo. M is the edited region: the photo's mask dilated by 2 latent cells.
Masks cover 0.4–72 % of a photo. With a plain mean over the panel, the weight of M would therefore differ between scenes
by a factor of more than a hundred. The kind `balanced` gives half of the weight to M and half to the rest of the photo.
"""

import jax
import jax.numpy as jnp

from ra_jax.models.conditioning import pack

LOSS_REGIONS = ("balanced", "panel", "mask", "all")
DILATION_CELLS = 2  # distance by which the mask is dilated, in latent cells


def _normalize(region: jax.Array) -> jax.Array:
    """Compute weights [B, h, w] that are equal inside a region and sum to 1. They are all 0 if the region is empty."""
    return region / jnp.maximum(region.sum((1, 2), keepdims=True), 1.0)


def region_weights(mask: jax.Array, factor: int, kind: str = "balanced") -> jax.Array:
    """Compute weights over packed latents whose weighted sum is mean_Ω.

    The values of `kind` are:

        balanced  ½·mean over M + ½·mean over the rest of the right panel; if M is the whole panel, the mean over M
        panel     mean over the right panel
        mask      mean over M
        all       mean over the whole diptych

    Args:
        mask: [B, H, W], mask of the whole diptych in pixels: 1 = edited, and 0 on the left panel.
        factor: the VAE's f, pixels per latent cell along a side.
        kind: one of `LOSS_REGIONS`.

    Returns:
        [B, N, 4]: a weight for each latent cell of a token, in the order (row, column). The weights of an image whose
        mask is not empty sum to 1.

    Raises:
        ValueError: if `kind` is unknown.
    """
    b, h, w = mask.shape
    cells = mask.reshape(b, h // factor, factor, w // factor, factor).max((2, 4))
    size = 2 * DILATION_CELLS + 1
    edited = jax.lax.reduce_window(cells, -jnp.inf, jax.lax.max, (1, size, size), (1, 1, 1), "SAME")
    panel = jnp.broadcast_to(jnp.arange(w // factor) >= w // factor // 2, cells.shape).astype(jnp.float32)
    edited = (edited > 0) * panel
    if kind == "balanced":
        rest = _normalize(panel - edited)
        edited_share = 1.0 - 0.5 * rest.sum((1, 2), keepdims=True)
        weights = edited_share * _normalize(edited) + 0.5 * rest
    elif kind == "panel":
        weights = _normalize(panel)
    elif kind == "mask":
        weights = _normalize(edited)
    elif kind == "all":
        weights = _normalize(jnp.ones_like(panel))
    else:
        raise ValueError(f"loss_region={kind!r}: expected one of {', '.join(LOSS_REGIONS)}")
    return pack(weights[..., None])


def region_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Compute mean_Ω of packed `values` [B, N, 4C] with `region_weights` [B, N, 4]: [B], float32.

    The features of a token are in the order (channel, row, column), as `pack` returns them.
    """
    b, n, features = values.shape
    by_cell = values.astype(jnp.float32).reshape(b, n, features // 4, 4).mean(2)
    return (by_cell * weights).sum((1, 2))
