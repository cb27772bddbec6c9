import itertools

import numpy as np
import pytest

from ra_jax.inference.crop import ASPECTS, MIN_MARGIN, panel_sizes, plan_crop

MULTIPLE = 16
SIZES = panel_sizes(512 * 512, MULTIPLE)


def draw_mask(shape, left, top, right, bottom, value=255):
    """Draw a mask that has `value` inside a box and 0 elsewhere."""
    mask = np.zeros(shape, np.uint8)
    mask[top:bottom, left:right] = value
    return mask


@pytest.mark.parametrize("multiple", [8, 16, 64])
@pytest.mark.parametrize("area", [64 * 64, 100 * 100, 512 * 512, 1024 * 1024])
def test_panel_sizes_are_multiples_within_the_area_and_near_their_aspect_ratios(area, multiple):
    sizes = panel_sizes(area, multiple)
    assert len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert height * width <= area
    if area >= 512 * 512 and multiple < 64:
        assert [h / w for h, w in sizes] == pytest.approx(list(ASPECTS), rel=0.05)


def test_an_area_below_one_block_is_refused():
    with pytest.raises(ValueError, match="max_area = 255"):
        panel_sizes(255, 16)


def test_crops_of_random_masks_have_the_documented_properties():
    rng = np.random.default_rng(0)
    shapes = [(100, 80), (512, 512), (600, 800), (1200, 300), (300, 2400), (70, 64)]
    for shape, _ in itertools.product(shapes, range(40)):
        x0, x1 = np.sort(rng.integers(0, shape[1] + 1, 2))
        y0, y1 = np.sort(rng.integers(0, shape[0] + 1, 2))
        mask = draw_mask(shape, x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))
        if not mask.any():
            continue
        crop = plan_crop(mask, SIZES, multiple=MULTIPLE)
        left, top, right, bottom = crop.window
        height, width = crop.size
        assert 0 <= left < right <= shape[1]
        assert 0 <= top < bottom <= shape[0]
        assert height % MULTIPLE == width % MULTIPLE == 0
        assert height * width <= 512 * 512
        assert height / (bottom - top) <= 2.0
        assert width / (right - left) <= 2.0
        # The window contains the mask and its margin, as far as the photo extends.
        margin = max(MIN_MARGIN, (max(y1 - y0, x1 - x0) + 1) // 2)
        assert left <= max(0, x0 - margin)
        assert top <= max(0, y0 - margin)
        assert right >= min(shape[1], x1 + margin)
        assert bottom >= min(shape[0], y1 + margin)
        # The aspect ratio changes only if the window is the whole photo.
        if (right - left, bottom - top) != shape[::-1]:
            assert crop.size in SIZES
            assert (height / (bottom - top)) / (width / (right - left)) == pytest.approx(1, abs=0.02)


def test_a_small_mask_is_enlarged_up_to_the_limit_and_centered():
    mask = draw_mask((1000, 1000), 500, 480, 510, 490)
    crop = plan_crop(mask, SIZES, multiple=MULTIPLE, max_upscale=2.0)
    assert crop.size == (512, 512)
    assert crop.window == (377, 357, 633, 613)


def test_an_oblong_mask_gets_an_oblong_panel():
    crop = plan_crop(draw_mask((1000, 1000), 100, 480, 500, 520), SIZES, multiple=MULTIPLE, context=0.1)
    assert crop.size == SIZES[0]  # height : width = 1 : 2


def test_the_window_of_a_mask_in_a_corner_stays_inside_the_photo():
    crop = plan_crop(draw_mask((1000, 1000), 990, 0, 1000, 10), SIZES, multiple=MULTIPLE)
    assert crop.window == (744, 0, 1000, 256)


def test_the_window_of_a_large_mask_is_the_whole_photo():
    crop = plan_crop(draw_mask((600, 1000), 10, 10, 990, 590), SIZES, multiple=MULTIPLE)
    assert crop.window == (0, 0, 1000, 600)
    assert crop.size == (384, 656)  # the photo's aspect ratio: 396.6 × 661, rounded down to multiples of 16


def test_the_window_covers_the_soft_edge_of_a_mask():
    mask = draw_mask((1000, 1000), 200, 200, 800, 400, value=60)
    mask[290:310, 490:510] = 255
    left, _, right, _ = plan_crop(mask, SIZES, multiple=MULTIPLE).window
    assert left <= 200
    assert right >= 800


@pytest.mark.parametrize("value", [0, 60, 127])
def test_a_mask_without_values_above_127_is_refused(value):
    with pytest.raises(ValueError, match="empty mask of 40 × 30 pixels"):
        plan_crop(np.full((30, 40), value, np.uint8), SIZES, multiple=MULTIPLE)


def test_panels_of_photo_and_mask_show_the_window():
    photo = np.random.default_rng(1).integers(0, 256, (600, 800, 3), np.uint8)
    mask = draw_mask((600, 800), 300, 200, 312, 208)
    crop = plan_crop(mask, [(256, 256)], multiple=MULTIPLE, max_upscale=1.0)
    left, top, right, bottom = crop.window
    np.testing.assert_array_equal(crop.photo(photo), photo[top:bottom, left:right])
    np.testing.assert_array_equal(crop.mask(mask), mask[top:bottom, left:right] // 255)


def test_the_mask_panel_has_threshold_127_and_keeps_thin_lines():
    mask = draw_mask((800, 800), 100, 400, 700, 401)
    mask[0:300] = 127
    crop = plan_crop(mask, [(64, 64)], multiple=MULTIPLE)
    panel = crop.mask(mask)
    assert set(np.unique(panel)) == {0, 1}
    assert panel.any(0).sum() == pytest.approx(600 / 800 * 64, abs=2)
    assert panel.any(1).sum() == 1


def test_reference_panels_are_the_same_as_in_training():
    rng = np.random.default_rng(2)
    photo = rng.integers(0, 255, (300, 400, 3), np.uint8)
    mask = draw_mask((300, 400), 150, 100, 200, 150)
    crop = plan_crop(mask, [(128, 128)], multiple=MULTIPLE, max_upscale=1.0)
    left, top, right, bottom = crop.window
    reference = crop.reference(None, photo, mask)
    inside = mask[top:bottom, left:right] > 127
    np.testing.assert_array_equal(reference[inside], photo[mask > 127])
    assert (reference[~inside] == 255).all()
    np.testing.assert_array_equal(crop.reference(photo, photo, mask), crop.photo(photo))
    padded = crop.reference(np.zeros((20, 40, 3), np.uint8), photo, mask)
    assert (padded[:30] == 255).all()
    assert (padded[35:93] == 0).all()
