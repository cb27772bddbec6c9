"""What FLUX.1-Fill is shown beside the noisy latents: packed latents, Fill channels and context tokens.

Layouts follow diffusers' FluxFillPipeline exactly, only with channels last:
an image of H×W pixels has latents [B, H/f, W/f, C], which are packed 2×2 into N = (H/2f)·(W/2f) tokens
of 4C features in the order (channel, row, column).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["fill", "context", "pooled"], meta_fields=["grid"])
@dataclass(frozen=True)
class Condition:
    """Everything the network is told about an image to be filled.

    fill: [B, N, 4C + 4f²] masked-image latents and the mask; context: [B, S, joint_dim] text, then image tokens;
    pooled: [B, P]; grid: (rows, columns) of the N packed tokens.
    """

    fill: jax.Array
    context: jax.Array
    pooled: jax.Array
    grid: tuple[int, int]


def pack(latents: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, (h/2)(w/2), 4C], features in the order (channel, row, column); h and w even."""
    b, h, w, c = latents.shape
    blocks = latents.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return blocks.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(packed: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `pack`: [B, N, 4C] on a grid of (rows, columns) -> [B, 2·rows, 2·columns, C]."""
    b, _, features = packed.shape
    rows, columns = grid
    blocks = packed.reshape(b, rows, columns, features // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return blocks.reshape(b, 2 * rows, 2 * columns, features // 4)


def pack_mask(mask: jax.Array, factor: int) -> jax.Array:
    """Mask [B, H, W] in pixels -> [B, N, 4f²]: each f×f patch becomes f² channels, which are then packed 2×2."""
    b, h, w = mask.shape
    patches = mask.reshape(b, h // factor, factor, w // factor, factor).transpose(0, 1, 3, 2, 4)
    return pack(patches.reshape(b, h // factor, w // factor, factor * factor))


def token_mask(fill: jax.Array, latent_features: int) -> jax.Array:
    """The fraction of each token's pixels that are to be filled, [B, N], read from the Fill channels' mask part."""
    return fill[..., latent_features:].mean(-1)


def context_tokens(
    image_tokens: jax.Array | None,
    *,
    batch: int,
    text_tokens: int,
    joint_dim: int,
    text: jax.Array | None = None,
) -> jax.Array:
    """Context [B, S, joint_dim]: `text_tokens` zeros (or prompt embeddings `text`), then image tokens.

    Zeros stand for the empty prompt, as FLUX.1-Redux without text encoders does.
    """
    text = jnp.zeros((batch, text_tokens, joint_dim), jnp.float32) if text is None else text
    return text if image_tokens is None else jnp.concatenate([text, image_tokens], axis=1)
