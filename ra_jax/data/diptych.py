"""Diptychs: the reference (the object on white) on the left, the photo on the right.

The mask of a diptych is 0 in the left half. All functions accept NumPy arrays, JAX arrays and traced JAX arrays, with
any leading dimensions.
"""

from typing import TypeVar

import numpy as np

Array = TypeVar("Array")


def reference_on_white(source: Array, mask: Array) -> Array:
    """Return the masked object at its position on a white background.

    Args:
        source: [..., h, w, 3], uint8 or floating point in [0, 1].
        mask: [..., h, w]; pixels that are not 0 belong to the object.

    Returns:
        An array with the shape and dtype of `source`.

    Raises:
        ValueError: `mask.shape` differs from `source.shape[:-1]`.
    """
    if source.shape[:-1] != mask.shape:
        raise ValueError(
            f"mask has shape {mask.shape}: expected {source.shape[:-1]} for a source of shape {source.shape}"
        )
    xp = source.__array_namespace__()
    white = 255 if source.dtype == np.uint8 else 1
    return xp.where(mask[..., None] != 0, source, xp.asarray(white, dtype=source.dtype))


def join(reference: Array, photo: Array) -> Array:
    """Join two panels [..., h, w, c] to a diptych [..., h, 2w, c].

    Raises:
        ValueError: the panels have different shapes.
    """
    if reference.shape != photo.shape:
        raise ValueError(
            f"reference has shape {reference.shape}, photo has shape {photo.shape}: expected equal shapes; resize one "
            "of them"
        )
    return photo.__array_namespace__().concat([reference, photo], axis=-2)


def join_mask(mask: Array) -> Array:
    """Return the mask of a diptych, [..., h, w] -> [..., h, 2w]: 0 in the left half, where nothing is removed."""
    xp = mask.__array_namespace__()
    return xp.concat([xp.zeros_like(mask), mask], axis=-1)


def right_panel(x: Array, axis: int = -2) -> Array:
    """Return the photo's half of a diptych: [..., h, 2w, c] -> [..., h, w, c].

    For masks [..., h, 2w] pass axis=-1.

    Raises:
        ValueError: the width is odd.
    """
    width = x.shape[axis]
    if width % 2:
        raise ValueError(f"axis {axis} of shape {x.shape} is {width}: expected an even width, the width of two panels")
    axis %= x.ndim
    return x[(slice(None),) * axis + (slice(width // 2, None),)]
