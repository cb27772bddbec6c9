"""Pasting what the network made back into the photo: inside the mask, with a soft edge, and nowhere else."""

import numpy as np
from PIL import Image

from ra_jax.inference.crop import SOFT_FLOOR, Crop

FEATHER = 8  # pixels of the photo


def blend_weights(mask: np.ndarray, feather: int = FEATHER) -> np.ndarray:
    """How much of the new picture each pixel takes, [H, W] float32 in [0, 1].

    m, the mask's own values, count: soft masks stay soft (up to 16 is nothing and from 239 everything, since
    JPEG leaves noise there). Outwards weights fall by 1/feather a pixel, so that the object's own edge is not
    mixed back in:  w(p) = max(0, max_q m(q) − |p − q| / feather).

    mask: [H, W] uint8; feather: width of the falling edge in pixels, 0 for none.
    """
    soft = (mask.astype(np.float32) - SOFT_FLOOR) / (255 - 2 * SOFT_FLOOR)
    weights = np.clip(soft, 0.0, 1.0)
    height, width = mask.shape
    around = np.pad(weights, feather)
    for y, x in np.ndindex(2 * feather + 1, 2 * feather + 1):
        distance = np.hypot(y - feather, x - feather)
        if 0 < distance < feather:
            falling = around[y : y + height, x : x + width] - np.float32(distance / feather)
            np.maximum(weights, falling, out=weights)
    return weights


def paste(photo: np.ndarray, panel: np.ndarray, mask: np.ndarray, crop: Crop, feather: int = FEATHER) -> np.ndarray:
    """The photo with the panel blended into the crop's window by `blend_weights`, [H, W, 3] uint8.

    Pixels of weight 0, all those `feather` and more away from the mask, are the photo's, bit for bit.

    photo: [H, W, 3] uint8; panel: [h, w, 3], uint8 or floating in [0, 1]; mask: [H, W] uint8.

    Raises:
        ValueError: a panel that is not of the crop's size, or a mask that is not of the photo's.
    """
    if panel.shape != (*crop.size, 3) or mask.shape != photo.shape[:2]:
        raise ValueError(
            f"panel {panel.shape} and mask {mask.shape}: expected {(*crop.size, 3)}, the crop's size, and "
            f"{photo.shape[:2]}, the photo's"
        )
    if panel.dtype != np.uint8:
        panel = (np.clip(panel, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    left, top, right, bottom = crop.window
    inside = np.s_[top:bottom, left:right]
    made = Image.fromarray(panel).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    weights = blend_weights(mask[inside], feather)[..., None]
    blended = photo[inside] * (1 - weights) + np.asarray(made) * weights
    result = photo.copy()
    result[inside] = np.where(weights > 0, (blended + 0.5).astype(np.uint8), photo[inside])
    return result
