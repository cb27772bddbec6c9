"""Conditioning of FLUX.1-Fill: channels with the masked image and the mask, and context tokens. Packing of latents.

Layouts match diffusers' FluxFillPipeline, but with channels last. An image of H×W pixels has latents
[B, H/f, W/f, C]. They are packed 2×2 into N = (H/2f)·(W/2f) tokens of 4C features in the order (channel, row, column).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["fill", "context", "pooled"], meta_fields=["grid"])
@dataclass(frozen=True)
class Condition:
    """Conditioning of the network: the image to fill, its mask and the context.

    Attributes:
        fill: Fill channels [B, N, 4C + 4f²]: the masked image's latents, then the mask.
        context: context tokens [B, S, joint_dim]: text, then image tokens.
        pooled: pooled text embedding [B, P].
        grid: (rows, columns) of the N packed tokens.
    """

    fill: jax.Array
    context: jax.Array
    pooled: jax.Array
    grid: tuple[int, int]


def pack(latents: jax.Array) -> jax.Array:
    """Pack each 2×2 block of latent cells into a token: [B, h, w, C] -> [B, (h/2)(w/2), 4C], for even h and w.

    The features of a token are in the order (channel, row, column).
    """
    b, h, w, c = latents.shape
    blocks = latents.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return blocks.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(packed: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Invert `pack`: [B, N, 4C] on a grid of (rows, columns) -> [B, 2·rows, 2·columns, C]."""
    b, _, features = packed.shape
    rows, columns = grid
    blocks = packed.reshape(b, rows, columns, features // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return blocks.reshape(b, 2 * rows, 2 * columns, features // 4)


def pack_mask(mask: jax.Array, factor: int) -> jax.Array:
    """Pack a pixel mask into tokens: [B, H, W] -> [B, N, 4f²], with f = `factor`.

    Each patch of f×f pixels becomes the f² channels of a latent cell. `pack` then packs the cells.
    """
    b, h, w = mask.shape
    patches = mask.reshape(b, h // factor, factor, w // factor, factor).transpose(0, 1, 3, 2, 4)
    return pack(patches.reshape(b, h // factor, w // factor, factor * factor))


def token_mask(fill: jax.Array, latent_features: int) -> jax.Array:
    """Compute the fraction of each token's pixels that is in the mask, [B, N], from the Fill channels.

    `latent_features` is 4C, the number of Fill channels before the channels of the mask.
    """
    return fill[..., latent_features:].mean(-1)


def context_tokens(
    image_tokens: jax.Array | None,
    *,
    batch: int,
    text_tokens: int,
    joint_dim: int,
    text: jax.Array | None = None,
) -> jax.Array:
    """Concatenate text and image tokens into the context [B, S, joint_dim].

    Args:
        image_tokens: [B, T, joint_dim]; None: text alone.
        batch: B.
        text_tokens: number of zero tokens that replace a prompt, as in FLUX.1-Redux without text encoders. Unused if
            `text` is given.
        joint_dim: features of a context token.
        text: prompt embeddings [B, S - T, joint_dim] that replace the zeros.
    """
    text = jnp.zeros((batch, text_tokens, joint_dim), jnp.float32) if text is None else text
    return text if image_tokens is None else jnp.concatenate([text, image_tokens], axis=1)
