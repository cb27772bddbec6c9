"""The diptych: the reference (the object on white) left, the photo right; the mask is 0 on the left.

All functions take NumPy and JAX arrays alike (traced ones too), with any leading dimensions.
"""

from typing import TypeVar

import numpy as np

Array = TypeVar("Array")


def reference_on_white(source: Array, mask: Array) -> Array:
    """The masked object where it stands, on white.

    source: [..., h, w, 3], uint8 or floating in [0, 1]; mask: [..., h, w], not 0 = the object. Returns as
    `source`.

    Raises:
        ValueError: a mask that is not the photo without its channels.
    """
    if source.shape[:-1] != mask.shape:
        raise ValueError(f"mask {mask.shape} does not fit source {source.shape}: expected {source.shape[:-1]}")
    xp = source.__array_namespace__()
    white = 255 if source.dtype == np.uint8 else 1
    return xp.where(mask[..., None] != 0, source, xp.asarray(white, dtype=source.dtype))


def join(reference: Array, photo: Array) -> Array:
    """[..., h, w, c] and [..., h, w, c] -> [..., h, 2w, c].

    Raises:
        ValueError: panels of different shapes.
    """
    if reference.shape != photo.shape:
        raise ValueError(f"panels differ: reference {reference.shape}, photo {photo.shape}; resize them alike")
    return photo.__array_namespace__().concat([reference, photo], axis=-2)


def join_mask(mask: Array) -> Array:
    """[..., h, w] -> [..., h, 2w], nothing of the reference to be removed."""
    xp = mask.__array_namespace__()
    return xp.concat([xp.zeros_like(mask), mask], axis=-1)


def right_panel(x: Array, axis: int = -2) -> Array:
    """The photo's half of a diptych [..., h, 2w, c] -> [..., h, w, c]; for masks [..., h, 2w] say axis=-1.

    Raises:
        ValueError: a width that has no half.
    """
    width = x.shape[axis]
    if width % 2:
        raise ValueError(f"axis {axis} of shape {x.shape} is {width}: expected an even width, two panels side by side")
    axis %= x.ndim
    return x[(slice(None),) * axis + (slice(width // 2, None),)]
