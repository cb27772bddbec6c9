"""The part of a photo that the network sees: a window around the mask, resized to a panel.

A photo is edited through one panel of bounded size. Panels come in a few fixed sizes, since each size is a
compilation; the window takes the panel's shape, so that nothing is distorted, unless only the whole photo will do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ra_jax.data.diptych import reference_on_white
from ra_jax.data.images import MASK_THRESHOLD, Size, Window
from ra_jax.data.masks import bounding_box
from ra_jax.data.panels import resize_mask

ASPECTS = (1 / 2, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 2.0)  # height / width
# Soft masks: from here on a pixel counts as painted. JPEG leaves noise of some levels around a mask.
SOFT_FLOOR = 16
MIN_MARGIN = 16  # pixels of the photo


@dataclass(frozen=True)
class Crop:
    """window: (left, top, right, bottom) in the photo's pixels; size: (height, width) of the panel made of it."""

    window: Window
    size: Size

    def photo(self, photo: np.ndarray) -> np.ndarray:
        """The window of a photo [H, W, 3] uint8 as a panel [h, w, 3] uint8, bicubic as in training."""
        panel = Image.fromarray(photo).resize(self.size[::-1], Image.Resampling.BICUBIC, self.window)
        return np.asarray(panel)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """What a mask [H, W] uint8 removes (> 127), [h, w] uint8 {0, 1}; thin lines are kept."""
        return resize_mask(mask > MASK_THRESHOLD, self.window, self.size)

    def reference(self, reference: np.ndarray | None, photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The reference panel [h, w, 3] uint8, made as in training.

        Without a reference it is the object of photo and mask on white; one of the photo's size is seen
        through the window, so that the object stays at its place; any other is shown whole, centred on white.
        """
        if reference is None:
            return reference_on_white(self.photo(photo), self.mask(mask))
        if reference.shape == photo.shape:
            return self.photo(reference)
        panel = ImageOps.pad(Image.fromarray(reference), self.size[::-1], Image.Resampling.BICUBIC, color="white")
        return np.asarray(panel)


def panel_sizes(max_area: int, multiple: int) -> tuple[Size, ...]:
    """Panel sizes (h, w) of at most `max_area` pixels, sides multiples of `multiple`, from 1:2 to 2:1.

    Raises:
        ValueError: an area that does not hold one `multiple` by `multiple` square.
    """
    if max_area < multiple * multiple:
        raise ValueError(f"max_area = {max_area}: expected at least {multiple}² pixels, the smallest panel")
    sides = [(math.sqrt(max_area * aspect), math.sqrt(max_area / aspect)) for aspect in ASPECTS]
    sizes = [(_at_most(height, multiple), _at_most(width, multiple)) for height, width in sides]
    return tuple(dict.fromkeys(sizes))  # small areas give several aspects the same size


def plan_crop(
    mask: np.ndarray,
    sizes: Sequence[Size],
    *,
    multiple: int,
    context: float = 0.5,
    max_upscale: float = 2.0,
) -> Crop:
    """The window in which to edit a photo, and the panel to edit it in.

    The window holds the mask and `context` times its longer side around it (at least 16 pixels), as far as the
    photo reaches. Of the sizes whose window fits into the photo, the one that shows the object largest is taken,
    of equals the nearest in shape. Where none fits (a large mask, a small or oblong photo) the window is the whole
    photo, and the panel has its shape, rounded down to `multiple`, and at most the largest area of `sizes`.

    mask: [H, W] uint8, > 127 = remove; max_upscale: panel pixels for one pixel of the photo, at most.

    Raises:
        ValueError: a mask that removes nothing.
    """
    if not (mask > MASK_THRESHOLD).any():
        raise ValueError(
            f"empty mask of {mask.shape[1]} × {mask.shape[0]} pixels: expected one > {MASK_THRESHOLD} at least"
        )
    photo = mask.shape
    left, top, right, bottom = bounding_box(mask > SOFT_FLOOR)
    margin = max(MIN_MARGIN, math.ceil(context * max(bottom - top, right - left)))
    needed = min(photo[0], bottom - top + 2 * margin), min(photo[1], right - left + 2 * margin)

    fitting = []
    for height, width in sizes:
        scale = min(max_upscale, height / needed[0], width / needed[1])
        window = math.ceil(height / scale), math.ceil(width / scale)
        if window[0] <= photo[0] and window[1] <= photo[1]:
            shape = abs(math.log(height / width) - math.log(needed[0] / needed[1]))
            fitting.append((-scale, shape, window, (height, width)))
    if not fitting:
        return Crop((0, 0, photo[1], photo[0]), _whole(photo, sizes, multiple, max_upscale))
    _, _, (height, width), size = min(fitting)
    x = min(max((left + right - width) // 2, 0), photo[1] - width)
    y = min(max((top + bottom - height) // 2, 0), photo[0] - height)
    return Crop((x, y, x + width, y + height), size)


def _whole(photo: Size, sizes: Sequence[Size], multiple: int, max_upscale: float) -> Size:
    area = max(height * width for height, width in sizes)
    scale = min(max_upscale, math.sqrt(area / (photo[0] * photo[1])))
    return _at_most(photo[0] * scale, multiple), _at_most(photo[1] * scale, multiple)


def _at_most(length: float, multiple: int) -> int:
    """The multiple next below a length, or the first; the allowance is for the rounding of square roots."""
    return max(1, int(length * (1 + 1e-9)) // multiple) * multiple
