"""Crops: the network edits a window of the photo around the mask, resized to a panel (the network's image size).

The area of a panel has a limit. There are only a few panel sizes, because each size needs its own
compilation. The window has the aspect ratio of the panel, so that resizing does not distort the photo. If no such
window fits into the photo, the whole photo is resized to a panel of nearly the photo's aspect ratio.
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
# Values of a soft mask up to this value count as 0, because JPEG leaves noise of a few levels around a mask.
SOFT_FLOOR = 16
MIN_MARGIN = 16  # smallest margin between mask and window, in pixels of the photo


@dataclass(frozen=True)
class Crop:
    """A window of the photo, and the size of the panel that it is resized to.

    Attributes:
        window: (left, top, right, bottom) in pixels of the photo.
        size: (height, width) of the panel.
    """

    window: Window
    size: Size

    def photo(self, photo: np.ndarray) -> np.ndarray:
        """Resize the window of a photo [H, W, 3] uint8 to a panel [h, w, 3] uint8; bicubic, as in training."""
        panel = Image.fromarray(photo).resize(self.size[::-1], Image.Resampling.BICUBIC, self.window)
        return np.asarray(panel)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Resize the window of a mask [H, W] uint8 to a panel [h, w] uint8 {0, 1}, 1 = remove (mask > 127).

        A pixel of the panel is 1 if any masked pixel falls into it, so that thin lines are kept.
        """
        return resize_mask(mask > MASK_THRESHOLD, self.window, self.size)

    def reference(self, reference: np.ndarray | None, photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Compute the reference panel [h, w, 3] uint8, as in training.

        If `reference` is None, the panel has the masked object of the photo on a white background. A reference of the
        photo's size is cropped to the window, so that the object keeps its position. A reference of another size is
        resized as a whole to fit the panel, and centered on white.

        Args:
            reference: [H', W', 3] uint8, or None.
            photo: [H, W, 3] uint8.
            mask: [H, W] uint8, > 127 = remove.
        """
        if reference is None:
            return reference_on_white(self.photo(photo), self.mask(mask))
        if reference.shape == photo.shape:
            return self.photo(reference)
        panel = ImageOps.pad(Image.fromarray(reference), self.size[::-1], Image.Resampling.BICUBIC, color="white")
        return np.asarray(panel)


def panel_sizes(max_area: int, multiple: int) -> tuple[Size, ...]:
    """List panel sizes (h, w) with aspect ratios from 1:2 to 2:1.

    Each size has at most `max_area` pixels, and both sides are multiples of `multiple`.

    Raises:
        ValueError: `max_area` is smaller than a square of side `multiple`.
    """
    if max_area < multiple * multiple:
        raise ValueError(f"max_area = {max_area}: expected at least {multiple}² pixels, the smallest panel")
    sides = [(math.sqrt(max_area * aspect), math.sqrt(max_area / aspect)) for aspect in ASPECTS]
    sizes = [(_round_down(height, multiple), _round_down(width, multiple)) for height, width in sides]
    return tuple(dict.fromkeys(sizes))  # With a small area, several aspect ratios round to the same size.


def plan_crop(
    mask: np.ndarray,
    sizes: Sequence[Size],
    *,
    multiple: int,
    context: float = 0.5,
    max_upscale: float = 2.0,
) -> Crop:
    """Choose the window in which to edit a photo, and the size of its panel.

    The window contains the mask with its soft edge (values > 16) and a margin around the mask, as far as the photo
    extends. The size of the window depends on the panel size. Among the sizes whose window fits into the photo, the one
    that shows the object largest is chosen. If there is a tie, the aspect ratio nearest to the aspect ratio of mask and
    margin is chosen.

    If no window fits (large mask, small or elongated photo), the window is the whole photo. The panel then has the
    photo's aspect ratio, except that both sides are rounded down to multiples of `multiple`. Its area is at most the
    largest area in `sizes`.

    Args:
        mask: [H, W] uint8, > 127 = remove.
        sizes: panel sizes (h, w) to choose from.
        multiple: divisor of both sides of a panel, in pixels.
        context: width of the margin, as a fraction of the mask's longer side. The margin is at least 16 pixels wide.
        max_upscale: largest number of panel pixels per pixel of the photo, along each side.

    Raises:
        ValueError: the mask has no pixel > 127.
    """
    if not (mask > MASK_THRESHOLD).any():
        raise ValueError(
            f"empty mask of {mask.shape[1]} × {mask.shape[0]} pixels: expected at least one pixel > {MASK_THRESHOLD}"
        )
    photo_size = mask.shape
    left, top, right, bottom = bounding_box(mask > SOFT_FLOOR)
    margin = max(MIN_MARGIN, math.ceil(context * max(bottom - top, right - left)))
    min_window = min(photo_size[0], bottom - top + 2 * margin), min(photo_size[1], right - left + 2 * margin)

    choices = []
    for height, width in sizes:
        scale = min(max_upscale, height / min_window[0], width / min_window[1])
        window = math.ceil(height / scale), math.ceil(width / scale)
        if window[0] <= photo_size[0] and window[1] <= photo_size[1]:
            aspect_distance = abs(math.log(height / width) - math.log(min_window[0] / min_window[1]))
            choices.append((-scale, aspect_distance, window, (height, width)))
    if not choices:
        return Crop((0, 0, photo_size[1], photo_size[0]), _whole_photo_size(photo_size, sizes, multiple, max_upscale))
    _, _, (height, width), size = min(choices)
    x = min(max((left + right - width) // 2, 0), photo_size[1] - width)
    y = min(max((top + bottom - height) // 2, 0), photo_size[0] - height)
    return Crop((x, y, x + width, y + height), size)


def _whole_photo_size(photo_size: Size, sizes: Sequence[Size], multiple: int, max_upscale: float) -> Size:
    """Return the size of the panel that shows the whole photo."""
    area = max(height * width for height, width in sizes)
    scale = min(max_upscale, math.sqrt(area / (photo_size[0] * photo_size[1])))
    return _round_down(photo_size[0] * scale, multiple), _round_down(photo_size[1] * scale, multiple)


def _round_down(length: float, multiple: int) -> int:
    """Round a length down to a multiple of `multiple`, but not to 0.

    The factor 1 + 1e-9 compensates for rounding errors of square roots.
    """
    return max(1, int(length * (1 + 1e-9)) // multiple) * multiple
