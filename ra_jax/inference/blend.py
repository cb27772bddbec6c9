"""Blend the network's output into the photo. Only pixels inside the mask and its soft edge change."""

import numpy as np
from PIL import Image

from ra_jax.inference.crop import SOFT_FLOOR, Crop

FEATHER = 8  # width of the soft edge around the mask, in pixels of the photo


def blend_weights(mask: np.ndarray, feather: int = FEATHER) -> np.ndarray:
    """Compute the weight of the edited image at each pixel, [H, W] float32 in [0, 1].

        w(p) = max(0, max_q m(q) − |p − q| / feather)

    Here m is the mask, scaled linearly from values 16 … 239 to weights 0 … 1 and clipped. Soft masks stay soft, but
    JPEG noise near 0 and 255 is removed. Outside the mask, the weights fall by 1/feather per pixel. The edge of the
    removed object is therefore not blended back in.

    Args:
        mask: [H, W] uint8.
        feather: distance in pixels over which the weights fall from 1 to 0; 0 for a hard edge.
    """
    soft = (mask.astype(np.float32) - SOFT_FLOOR) / (255 - 2 * SOFT_FLOOR)
    weights = np.clip(soft, 0.0, 1.0)
    height, width = mask.shape
    padded = np.pad(weights, feather)
    for y, x in np.ndindex(2 * feather + 1, 2 * feather + 1):
        distance = np.hypot(y - feather, x - feather)
        if 0 < distance < feather:
            shifted = padded[y : y + height, x : x + width] - np.float32(distance / feather)
            np.maximum(weights, shifted, out=weights)
    return weights


def paste(photo: np.ndarray, panel: np.ndarray, mask: np.ndarray, crop: Crop, feather: int = FEATHER) -> np.ndarray:
    """Blend an edited panel into the photo, with `blend_weights`; returns [H, W, 3] uint8.

    Pixels of weight 0 keep the photo's values, bit for bit. All pixels at a distance of `feather` or more from the mask
    have weight 0.

    Args:
        photo: [H, W, 3] uint8.
        panel: [h, w, 3], uint8, or float in [0, 1].
        mask: [H, W] uint8.
        crop: the window of the photo that the panel shows, and the panel's size.
        feather: as in `blend_weights`.

    Raises:
        ValueError: `panel` does not have the crop's panel size, or `mask` does not have the photo's size.
    """
    if panel.shape != (*crop.size, 3):
        raise ValueError(f"panel has shape {panel.shape}: expected {(*crop.size, 3)}, the crop's panel size")
    if mask.shape != photo.shape[:2]:
        raise ValueError(f"mask has shape {mask.shape}: expected {photo.shape[:2]}, the photo's size")
    if panel.dtype != np.uint8:
        panel = (np.clip(panel, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    left, top, right, bottom = crop.window
    window = np.s_[top:bottom, left:right]
    edited = Image.fromarray(panel).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    weights = blend_weights(mask[window], feather)[..., None]
    blended = photo[window] * (1 - weights) + np.asarray(edited) * weights
    result = photo.copy()
    result[window] = np.where(weights > 0, (blended + 0.5).astype(np.uint8), photo[window])
    return result
