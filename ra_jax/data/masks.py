"""Mask augmentation in training: people paint around objects, loosely, where data sets cut them out.

Every augmented mask contains the mask it came from, and is a pure function of that mask and the generator's
state.
"""

import numpy as np
from PIL import Image, ImageDraw

OUTLINE, BOX, DILATION = "outline", "box", "dilation"
PROBABILITIES = {OUTLINE: 0.4, BOX: 0.4, DILATION: 0.2}

DILATION_SIZE, DILATION_TIMES = 7, 2
KNOTS = (8, 13)  # control points of an outline, half-open
SLACK = (1.05, 1.35)  # an outline's control points lie this factor beyond the mask, as seen from its centre
SAMPLES = 16  # points a Bézier segment is drawn with


def augment_mask(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """40 % a smooth outline around the mask, 40 % its bounding box, 20 % a dilation (7×7, twice).

    mask: [h, w], bool or {0, 1}; returns the same shape and dtype, a superset of it.

    Raises:
        ValueError: an empty mask.
    """
    inside = mask != 0
    if not inside.any():
        raise ValueError(f"empty mask {mask.shape}: expected at least one pixel to remove")
    kind = rng.choice(list(PROBABILITIES), p=list(PROBABILITIES.values()))
    if kind == OUTLINE:
        grown = bezier_outline(inside, rng)
    elif kind == BOX:
        grown = box(inside)
    else:
        grown = square_dilation(inside, DILATION_SIZE, DILATION_TIMES)
    return grown.astype(mask.dtype)


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a mask that is not empty, right and bottom exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def box(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box, filled. [h, w] bool."""
    left, top, right, bottom = bounding_box(mask)
    filled = np.zeros(mask.shape, bool)
    filled[top:bottom, left:right] = True
    return filled


def square_dilation(mask: np.ndarray, size: int, times: int = 1) -> np.ndarray:
    """[h, w] bool dilated by a size×size square (odd), `times` over: one square of times·(size − 1) + 1."""
    reach = times * (size // 2)
    for axis in (0, 1):
        rows = np.moveaxis(mask, axis, 0)
        grown = rows.copy()
        for step in range(1, min(reach, len(rows) - 1) + 1):
            grown[step:] |= rows[:-step]
            grown[:-step] |= rows[step:]
        mask = np.moveaxis(grown, 0, axis)
    return mask


def bezier_outline(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random smooth closed curve around the mask, filled. [h, w] bool.

    8 to 12 control points around the bounding box's centre, each at U(1.05, 1.35) times the mask's reach in its
    direction, are joined by cubic Bézier segments (tangents as Catmull and Rom's). What little of the mask such a
    curve may leave out is added.
    """
    left, top, right, bottom = bounding_box(mask)
    center = np.array([(left + right) / 2, (top + bottom) / 2])
    # The edge is enough: going outwards from any pixel of the mask one leaves through its edge.
    edge = mask & ~_eroded(mask)
    offsets = np.argwhere(edge)[:, ::-1] + 0.5 - center
    angles = np.arctan2(offsets[:, 1], offsets[:, 0])
    distances = np.hypot(offsets[:, 0], offsets[:, 1]) + 1  # to a pixel's far corner, and a little

    knots = int(rng.integers(*KNOTS))
    spacing = 2 * np.pi / knots
    directions = (np.arange(knots) + rng.uniform(-0.25, 0.25, knots)) * spacing + rng.uniform(0, spacing)
    # So wide that both control points beside a pixel know of it, and the curve between them passes outside.
    nearby = np.abs((angles - directions[:, None] + np.pi) % (2 * np.pi) - np.pi) <= 1.25 * spacing
    reach = np.where(nearby, distances, 0.0).max(1).clip(min=0.25 * distances.max())
    radii = reach * rng.uniform(*SLACK, knots)
    curve = _closed_bezier(radii[:, None] * np.stack([np.cos(directions), np.sin(directions)], 1))

    canvas = Image.new("L", mask.shape[::-1])
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in curve + center - 0.5], fill=1)
    return mask | (np.asarray(canvas) != 0)


def _closed_bezier(points: np.ndarray) -> np.ndarray:
    """[16·K, 2] points on the closed curve of cubic Béziers through points [K, 2].

    The segment from P to N, whose neighbours are L and M, has the controls P, P + (N − L)/6, N − (M − P)/6,
    N.
    """
    before, after, beyond = np.roll(points, 1, 0), np.roll(points, -1, 0), np.roll(points, -2, 0)
    controls = np.stack([points, points + (after - before) / 6, after - (beyond - points) / 6, after])
    t = np.arange(SAMPLES) / SAMPLES
    bernstein = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    return np.einsum("cs,ckd->ksd", bernstein, controls).reshape(-1, 2)


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours are all in the mask; beyond the picture is outside."""
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
