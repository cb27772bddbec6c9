import numpy as np
import pytest
from scipy import ndimage

from ra_jax.data.masks import augment_mask, bezier_outline, bounding_box, fill_bounding_box, square_dilation


def draw_blobs(seed, size=(48, 64)):
    """Draw a mask of one to three random ellipses and one random pixel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    mask = np.zeros(size, bool)
    for _ in range(rng.integers(1, 4)):
        center, radii = rng.uniform([5, 5], [size[0] - 5, size[1] - 5]), rng.uniform(1, 9, 2)
        mask |= ((y - center[0]) / radii[0]) ** 2 + ((x - center[1]) / radii[1]) ** 2 <= 1
    mask[rng.integers(size[0]), rng.integers(size[1])] = True
    return mask


def test_augmented_mask_contains_the_mask_and_has_its_shape_and_dtype():
    for seed in range(200):
        mask = draw_blobs(seed).astype(np.uint8 if seed % 2 else bool)
        augmented = augment_mask(mask, np.random.default_rng(seed))
        assert augmented.shape == mask.shape and augmented.dtype == mask.dtype
        assert set(np.unique(augmented)) <= {0, 1}
        assert (augmented >= mask).all()


def test_generators_of_the_same_seed_give_the_same_mask():
    for seed in range(20):
        first, second = (augment_mask(draw_blobs(3), np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(first, second)
    distinct_masks = {augment_mask(draw_blobs(3), np.random.default_rng(seed)).tobytes() for seed in range(40)}
    assert len(distinct_masks) > 10  # the outlines differ; box and dilation are always the same


def test_forty_percent_of_masks_become_boxes_and_twenty_percent_are_dilated():
    mask = draw_blobs(5)
    box_mask, dilated_mask = fill_bounding_box(mask), square_dilation(mask, 7, 2)
    rng = np.random.default_rng(0)
    augmented_masks = [augment_mask(mask, rng) for _ in range(2000)]
    box_share = np.mean([np.array_equal(augmented, box_mask) for augmented in augmented_masks])
    dilation_share = np.mean([np.array_equal(augmented, dilated_mask) for augmented in augmented_masks])
    assert abs(box_share - 0.4) < 0.04  # 0.04 is 3.6 standard deviations
    assert abs(dilation_share - 0.2) < 0.035


def test_box_fills_the_bounding_box():
    mask = np.zeros((6, 8), bool)
    mask[1, 5] = mask[4, 2] = True
    assert bounding_box(mask) == (2, 1, 6, 5)
    expected = np.zeros((6, 8), bool)
    expected[1:5, 2:6] = True
    np.testing.assert_array_equal(fill_bounding_box(mask), expected)


@pytest.mark.parametrize("shape", [(48, 64), (5, 64), (1, 3)])
def test_square_dilation_equals_repeated_maximum_filters(shape):
    mask = np.random.default_rng(0).random(shape) < 0.02
    mask[0, 0] = True
    once = ndimage.maximum_filter(mask.astype(np.uint8), 7, mode="constant")
    expected = ndimage.maximum_filter(once, 7, mode="constant")
    np.testing.assert_array_equal(square_dilation(mask, 7, 2), expected)


def test_outline_is_one_region_without_holes_that_contains_all_parts_of_the_mask():
    for seed in range(50):
        mask = np.zeros((64, 64), bool)
        mask[20:24, 12:20] = mask[40:46, 40:50] = True
        outline = bezier_outline(mask, np.random.default_rng(seed))
        assert (outline >= mask).all()
        assert ndimage.label(outline, np.ones((3, 3)))[1] == 1
        assert (ndimage.binary_fill_holes(outline) == outline).all()


def test_outline_is_smooth_and_not_much_larger_than_the_mask():
    y, x = np.mgrid[:128, :128]
    mask = (y - 64) ** 2 + (x - 64) ** 2 <= 20**2
    for seed in range(20):
        outline = bezier_outline(mask, np.random.default_rng(seed))
        assert 1.05**2 < outline.sum() / mask.sum() < 1.8**2
        edge = outline & ~ndimage.binary_erosion(outline)
        perimeter, area = edge.sum(), outline.sum()
        assert perimeter**2 / area < 1.5 * 4 * np.pi  # 4π for a circle; spikes and fringes increase it


def test_curve_of_the_outline_encloses_the_mask():
    """A mask pixel at the edge of the outline is one that the curve left out. This is rare."""
    masks_at_edge = 0
    for seed in range(300):
        mask = draw_blobs(seed, (128, 128))
        outline = bezier_outline(mask, np.random.default_rng(seed))
        edge = outline & ~ndimage.binary_erosion(outline, border_value=1)
        masks_at_edge += (edge & mask).any()
    assert masks_at_edge <= 3


def test_a_mask_of_one_corner_pixel_keeps_its_pixel():
    mask = np.zeros((16, 16), bool)
    mask[0, 15] = True
    for seed in range(50):
        assert augment_mask(mask, np.random.default_rng(seed))[0, 15]


def test_empty_mask_is_refused():
    with pytest.raises(ValueError, match="at least one pixel"):
        augment_mask(np.zeros((8, 8), bool), np.random.default_rng(0))
