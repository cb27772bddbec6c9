import numpy as np
import pytest

from ra_jax.inference.blend import blend_weights, paste
from ra_jax.inference.crop import Crop, panel_sizes, plan_crop


def draw_disc(shape, center, radius):
    """Draw a disc: its mask [H, W] uint8 {0, 255}, and the distance of each pixel to its edge, negative inside."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    distance = np.hypot(y - center[0], x - center[1])
    return np.where(distance <= radius, 255, 0).astype(np.uint8), distance - radius


def test_weights_are_one_inside_the_mask_and_fall_linearly_outside():
    mask, _ = draw_disc((70, 80), (30, 40), 15)
    weights = blend_weights(mask, feather=10)
    offsets = np.indices(mask.shape).reshape(2, -1, 1) - np.argwhere(mask).T[:, None]
    distance = np.hypot(*offsets).min(-1).reshape(mask.shape)  # to the nearest pixel of the mask
    np.testing.assert_allclose(weights, np.maximum(0, 1 - distance / 10), atol=1e-6)
    assert (weights[mask > 0] == 1).all()
    assert weights.dtype == np.float32


def test_weights_without_feather_equal_the_mask():
    mask, _ = draw_disc((40, 40), (20, 20), 9)
    np.testing.assert_array_equal(blend_weights(mask, feather=0), mask / 255)


def test_soft_masks_stay_soft_and_jpeg_noise_is_removed():
    mask = np.array([[0, 10, 16, 70, 127.5, 185, 239, 250, 255]]).round().astype(np.uint8)
    weights = blend_weights(mask, feather=0)[0]
    assert (weights[:3] == 0).all()
    assert (weights[-3:] == 1).all()
    np.testing.assert_allclose(weights[3:6], [0.242, 0.502, 0.758], atol=1e-3)


def test_feathering_never_lowers_the_weights_of_a_soft_edge():
    mask = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (8, 1))
    assert (blend_weights(mask, feather=4) >= blend_weights(mask, feather=0)).all()


@pytest.mark.parametrize("shape", [(600, 800), (90, 70)])
def test_pixels_outside_the_feathered_mask_keep_the_photos_values(shape):
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (*shape, 3), np.uint8)
    before = photo.copy()
    mask, distance = draw_disc(shape, (shape[0] // 2, shape[1] // 3), 15)
    crop = plan_crop(mask, panel_sizes(256 * 256, 16), multiple=16)
    panel = rng.random((*crop.size, 3), np.float32)
    result = paste(photo, panel, mask, crop, feather=8)
    assert result.shape == photo.shape
    np.testing.assert_array_equal(result[distance > 9], photo[distance > 9])
    assert (result[distance <= 4] != photo[distance <= 4]).mean() > 0.9
    np.testing.assert_array_equal(photo, before)


def test_a_panel_of_the_windows_size_is_pasted_exactly():
    rng = np.random.default_rng(1)
    photo, panel = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    mask, _ = draw_disc((64, 64), (32, 32), 10)
    result = paste(photo, panel, mask, Crop((0, 0, 64, 64), (64, 64)), feather=0)
    np.testing.assert_array_equal(result, np.where(mask[..., None] > 0, panel, photo))


def test_pasting_the_unedited_crop_changes_pixels_by_at_most_two_levels():
    y, x = np.mgrid[:300, :400]
    photo = np.stack([y * 255 / 300, x * 255 / 400, (x + y) * 255 / 700], -1).astype(np.uint8)
    mask, _ = draw_disc((300, 400), (150, 200), 30)
    crop = plan_crop(mask, panel_sizes(256 * 256, 16), multiple=16)
    assert crop.size[0] > crop.window[3] - crop.window[1]  # the crop enlarges, and pasting reduces again
    change = np.abs(paste(photo, crop.photo(photo), mask, crop).astype(int) - photo)
    assert change.max() <= 2


def test_weights_are_zero_at_the_edge_of_the_window():
    """The margin is wider than the feather, so weights reach 0 inside the window."""
    mask, _ = draw_disc((500, 500), (250, 250), 3)
    crop = plan_crop(mask, panel_sizes(128 * 128, 16), multiple=16, max_upscale=100)  # the tightest window
    left, top, right, bottom = crop.window
    weights = blend_weights(mask)
    weights[top + 1 : bottom - 1, left + 1 : right - 1] = 0
    assert not weights.any()


def test_a_panel_or_mask_of_another_size_is_refused():
    photo, mask = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 255, np.uint8)
    crop = Crop((0, 0, 64, 64), (32, 32))
    with pytest.raises(ValueError, match=r"expected \(32, 32, 3\)"):
        paste(photo, np.zeros((64, 64, 3), np.uint8), mask, crop)
    with pytest.raises(ValueError, match="the photo's"):
        paste(photo, np.zeros((32, 32, 3), np.uint8), mask[:32], crop)
