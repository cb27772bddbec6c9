"""Mask augmentation for training. Masks in data sets follow the object closely, but users paint loosely around it.

An augmented mask contains the original mask. It depends only on the original mask and on the state of the random
generator.
"""

import numpy as np
from PIL import Image, ImageDraw

OUTLINE, BOX, DILATION = "outline", "box", "dilation"
PROBABILITIES = {OUTLINE: 0.4, BOX: 0.4, DILATION: 0.2}

DILATION_SIZE, DILATION_TIMES = 7, 2
CONTROL_POINT_RANGE = (8, 13)  # an outline has at least 8 and fewer than 13 control points
RADIUS_RANGE = (1.05, 1.35)  # distance of a control point from the center, divided by the reach of the mask
POINTS_PER_SEGMENT = 16  # points per Bézier segment


def augment_mask(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Enlarge a mask at random: 40 % smooth outline, 40 % bounding box, 20 % dilation (7×7, twice).

    Args:
        mask: [h, w], bool or {0, 1}.
        rng: random generator that chooses the kind of enlargement and draws the outline.

    Returns:
        A mask of the same shape and dtype that contains `mask`.

    Raises:
        ValueError: the mask is empty.
    """
    inside = mask != 0
    if not inside.any():
        raise ValueError(f"empty mask {mask.shape}: expected at least one pixel to remove")
    kind = rng.choice(list(PROBABILITIES), p=list(PROBABILITIES.values()))
    if kind == OUTLINE:
        enlarged = bezier_outline(inside, rng)
    elif kind == BOX:
        enlarged = fill_bounding_box(inside)
    else:
        enlarged = square_dilation(inside, DILATION_SIZE, DILATION_TIMES)
    return enlarged.astype(mask.dtype)


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a mask that is not empty; right and bottom are exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def fill_bounding_box(mask: np.ndarray) -> np.ndarray:
    """Return a mask that fills the bounding box of `mask`; both are [h, w] bool."""
    left, top, right, bottom = bounding_box(mask)
    filled = np.zeros(mask.shape, bool)
    filled[top:bottom, left:right] = True
    return filled


def square_dilation(mask: np.ndarray, size: int, times: int = 1) -> np.ndarray:
    """Dilate a mask [h, w] bool `times` times by a square of odd side `size`.

    The result equals one dilation by a square of side times·(size − 1) + 1.
    """
    reach = times * (size // 2)
    for axis in (0, 1):
        rows = np.moveaxis(mask, axis, 0)
        dilated = rows.copy()
        for step in range(1, min(reach, len(rows) - 1) + 1):
            dilated[step:] |= rows[:-step]
            dilated[:-step] |= rows[step:]
        mask = np.moveaxis(dilated, 0, axis)
    return mask


def bezier_outline(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a random smooth closed curve around the mask and fill it; returns [h, w] bool.

    8 to 12 control points lie around the center of the bounding box. The reach of the mask in a direction is the
    distance from the center to the farthest mask pixel near that direction. A control point is at U(1.05, 1.35) times
    the reach in its direction. Cubic Bézier segments with Catmull-Rom tangents join the points. The curve may miss a
    few pixels of the mask. These are added to the result.
    """
    left, top, right, bottom = bounding_box(mask)
    center = np.array([(left + right) / 2, (top + bottom) / 2])
    # Only edge pixels are needed, because the mask pixel farthest from the center in any direction is an edge pixel.
    edge = mask & ~_erode(mask)
    offsets = np.argwhere(edge)[:, ::-1] + 0.5 - center
    angles = np.arctan2(offsets[:, 1], offsets[:, 0])
    distances = np.hypot(offsets[:, 0], offsets[:, 1]) + 1  # + 1: the curve also encloses the pixel's far corner

    count = int(rng.integers(*CONTROL_POINT_RANGE))
    spacing = 2 * np.pi / count
    directions = (np.arange(count) + rng.uniform(-0.25, 0.25, count)) * spacing + rng.uniform(0, spacing)
    # ±1.25 spacings are wide enough that the control points on both sides of a pixel take its distance into account.
    # The curve between the two then passes outside the pixel.
    nearby = np.abs((angles - directions[:, None] + np.pi) % (2 * np.pi) - np.pi) <= 1.25 * spacing
    reach = np.where(nearby, distances, 0.0).max(1).clip(min=0.25 * distances.max())
    radii = reach * rng.uniform(*RADIUS_RANGE, count)
    curve = _closed_bezier(radii[:, None] * np.stack([np.cos(directions), np.sin(directions)], 1))

    canvas = Image.new("L", mask.shape[::-1])
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in curve + center - 0.5], fill=1)
    return mask | (np.asarray(canvas) != 0)


def _closed_bezier(points: np.ndarray) -> np.ndarray:
    """Join points [K, 2] by a closed curve of cubic Bézier segments, and return 16 points of each segment, [16·K, 2].

    For consecutive points L, P, N, M, the segment from P to N has the control points P, P + (N − L)/6, N − (M − P)/6
    and N.
    """
    before, after, second_after = np.roll(points, 1, 0), np.roll(points, -1, 0), np.roll(points, -2, 0)
    controls = np.stack([points, points + (after - before) / 6, after - (second_after - points) / 6, after])
    t = np.arange(POINTS_PER_SEGMENT) / POINTS_PER_SEGMENT
    bernstein = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    return np.einsum("cs,ckd->ksd", bernstein, controls).reshape(-1, 2)


def _erode(mask: np.ndarray) -> np.ndarray:
    """Keep pixels whose four neighbors are all in the mask. Pixels beyond the image border are not in the mask."""
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
