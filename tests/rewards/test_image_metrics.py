"""Compares image metrics with loops in NumPy and closed forms, also at borders and in empty regions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.rewards import image_metrics as im


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def box_mask(size, *boxes):
    """Return a mask [1, size, size] float32 that is 1 in boxes (top, bottom, left, right)."""
    mask = np.zeros((1, size, size), np.float32)
    for top, bottom, left, right in boxes:
        mask[:, top:bottom, left:right] = 1
    return mask


def extreme_masks(size):
    """Return 8 masks: no pixel, all pixels, one pixel, all but one, a border, a line, one half, a chessboard."""
    masks = np.zeros((8, size, size), np.float32)
    masks[1] = 1
    masks[2, size // 2, size // 2] = 1
    masks[3] = 1 - masks[2]
    masks[4, :3], masks[5, size // 2], masks[6, :, : size // 2] = 1, 1, 1
    masks[7] = np.indices((size, size)).sum(0) % 2
    return masks


def test_mse_psnr_and_masked_mean_depend_on_the_region_only(rng):
    image, target = rng.uniform(size=(2, 2, 6, 5, 3)).astype(np.float32)
    region = (rng.uniform(size=(2, 6, 5)) > 0.5).astype(np.float32)
    by_hand = np.array([((image[i] - target[i])[region[i] == 1] ** 2).mean() for i in range(2)])
    np.testing.assert_allclose(im.mse(image, target, region), by_hand, rtol=1e-5)
    np.testing.assert_allclose(im.psnr(image, target, region), 10 * np.log10(1 / by_hand), rtol=1e-5)
    np.testing.assert_allclose(
        im.masked_mean(image[..., 0], region > 0),
        [image[i, ..., 0][region[i] == 1].mean() for i in range(2)],
        rtol=1e-5,
    )


def test_equal_images_and_empty_regions_have_a_psnr_of_100():
    image = np.full((1, 4, 4, 3), 0.3, np.float32)
    some, none = box_mask(4, (0, 2, 0, 2)), box_mask(4)
    assert (
        im.psnr(image, image, some)
        == im.psnr(image, 1 - image, none)
        == im.trimmed_psnr(image, image, none, 0.05)
        == 100
    )
    assert im.mse(image, 1 - image, none) == 0


def test_trimmed_psnr_ignores_the_worst_pixels(rng):
    errors = rng.uniform(0.1, 0.5, (1, 10, 10)).astype(np.float32)
    region = np.ones((1, 10, 10), np.float32)
    region[:, :6] = 0  # 40 pixels remain, and 2 of them are trimmed
    target = np.zeros((1, 10, 10, 3), np.float32)
    image = np.repeat(errors[..., None], 3, -1)
    smallest = np.sort(errors[:, 6:].ravel())[:38]
    np.testing.assert_allclose(
        im.trimmed_psnr(image, target, region, 0.05), -10 * np.log10((smallest**2).mean()), rtol=1e-5
    )
    # 6.25 % of 40 is 2.5 pixels, so the 38th pixel counts half.
    weight = np.r_[np.ones(37), 0.5]
    np.testing.assert_allclose(
        im.trimmed_psnr(image, target, region, 0.0625), -10 * np.log10((weight * smallest**2).sum() / 37.5), rtol=1e-5
    )
    np.testing.assert_allclose(im.trimmed_psnr(image, target, region, 0.0), im.psnr(image, target, region), rtol=1e-5)


@pytest.mark.parametrize("pixels", [0, 1, 3, 20])
def test_dilation_and_erosion_are_the_extremes_of_a_square_around_each_pixel(rng, pixels):
    mask = (rng.uniform(size=(1, 12, 9)) > 0.8).astype(np.float32)
    maxima = np.array(
        [
            [mask[0, max(0, y - pixels) : y + pixels + 1, max(0, x - pixels) : x + pixels + 1].max() for x in range(9)]
            for y in range(12)
        ]
    )
    np.testing.assert_array_equal(im.dilate(mask, pixels)[0], maxima)
    np.testing.assert_array_equal(im.erode(1 - mask, pixels)[0], 1 - maxima)


def test_erosion_does_not_remove_pixels_at_the_border_of_the_image():
    np.testing.assert_array_equal(im.erode(box_mask(8, (0, 8, 0, 5)), 2), box_mask(8, (0, 8, 0, 3)))
    np.testing.assert_array_equal(im.erode(box_mask(8, (0, 8, 0, 8)), 3), box_mask(8, (0, 8, 0, 8)))


def test_bands_follow_the_edge_of_the_mask():
    mask = box_mask(20, (5, 15, 5, 15))
    inner = box_mask(20, (6, 14, 6, 14)) - box_mask(20, (8, 12, 8, 12))
    outer = box_mask(20, (2, 18, 2, 18)) - box_mask(20, (4, 16, 4, 16))
    seam = box_mask(20, (3, 17, 3, 17)) - box_mask(20, (7, 13, 7, 13))
    np.testing.assert_array_equal(im.inner_band(mask, 1, 3), inner)
    np.testing.assert_array_equal(im.outer_band(mask, 1, 3), outer)
    np.testing.assert_array_equal(im.seam_band(mask > 0, 2), seam)


def test_gaussian_blur_of_a_point_is_a_gaussian():
    image = np.zeros((1, 21, 21, 2), np.float32)
    image[0, 10, 10] = [1, 2]
    offsets = np.arange(-10, 11)
    kernel = np.exp(-0.5 * (offsets / 1.5) ** 2) * (abs(offsets) <= 6)
    kernel /= kernel.sum()
    blurred = jax.jit(im.gaussian_blur, static_argnums=1)(image, 1.5)[0]
    np.testing.assert_allclose(blurred, np.outer(kernel, kernel)[..., None] * [1, 2], atol=1e-6)


def test_gaussian_blur_repeats_the_border_pixels():
    image = np.broadcast_to(np.linspace(0, 1, 8, dtype=np.float32)[:, None, None], (1, 8, 5, 1))
    padded = np.pad(image[0, :, 0, 0], 4, mode="edge")
    kernel = np.exp(-0.5 * np.arange(-4, 5) ** 2)
    by_hand = np.convolve(padded, kernel / kernel.sum(), mode="valid")
    blurred = jax.jit(im.gaussian_blur, static_argnums=1)(image, 1.0)
    np.testing.assert_allclose(blurred[0, :, 2, 0], by_hand, atol=1e-6)


def test_gradients_and_laplacian_of_a_quadratic_image():
    y, x = np.indices((7, 9)).astype(np.float32)
    image = (2 * x + 0.5 * x**2 - y**2)[None, ..., None]
    inside = (0, slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(im.gradients(image)[inside][..., 0], -2 * y[1:-1, 1:-1], atol=1e-4)
    np.testing.assert_allclose(im.gradients(image)[inside][..., 1], (2 + x)[1:-1, 1:-1], atol=1e-4)
    np.testing.assert_allclose(im.laplacian(image)[inside], 1.0 - 2.0, atol=1e-4)
    assert im.gradients(image)[0, 0, 0, 1] == (image[0, 0, 1, 0] - image[0, 0, 0, 0]) / 2
    assert im.laplacian(image)[0, 0, 0, 0] == image[0, 0, 1, 0] + image[0, 1, 0, 0] - 2 * image[0, 0, 0, 0]


def test_edge_difference_is_the_mean_over_pixel_pairs_across_the_mask_edges(rng):
    image = rng.uniform(size=(2, 7, 6, 3)).astype(np.float32)
    masks = (rng.uniform(size=(2, 2, 7, 6)) > 0.5).astype(np.float32)
    for i in range(2):
        differences = [
            np.abs(image[i, y, x] - image[i, y + dy, x + dx]).mean()
            for mask in masks[:, i]
            for dy, dx in ((0, 1), (1, 0))
            for y in range(7 - dy)
            for x in range(6 - dx)
            if mask[y, x] != mask[y + dy, x + dx]
        ]
        mean, count = im.edge_difference(image, *masks)
        np.testing.assert_allclose([mean[i], count[i]], [np.mean(differences), len(differences)], rtol=1e-5)
    assert im.edge_difference(image, np.ones((2, 7, 6)))[0].tolist() == [0, 0]


def test_wasserstein_of_two_colors_is_their_distance():
    image = np.zeros((1, 4, 4, 3), np.float32)
    image[:, :, :2] = [0.2, 0.5, 0.9]
    image[:, :, 2:] = [0.35, 0.5, 0.0]
    left, right = box_mask(4, (0, 4, 0, 2)), box_mask(4, (0, 4, 2, 4))
    np.testing.assert_allclose(im.wasserstein(image, left, right), (0.15 + 0.0 + 0.9) / 3, atol=1e-5)
    assert im.wasserstein(image, left, box_mask(4)) == im.wasserstein(image, box_mask(4), right) == 0


def test_wasserstein_is_the_mean_distance_of_sorted_values(rng):
    image = rng.uniform(size=(1, 16, 16, 3)).astype(np.float32)
    image[:, :, 8:] **= 2
    left, right = box_mask(16, (0, 16, 0, 8)), box_mask(16, (0, 16, 8, 16))
    first, second = (np.sort(half.reshape(-1, 3), axis=0) for half in (image[:, :, :8], image[:, :, 8:]))
    np.testing.assert_allclose(im.wasserstein(image, left, right), np.abs(first - second).mean(), atol=2e-3)


@pytest.mark.parametrize("size", [4, 32])
def test_extreme_masks_give_finite_values(rng, size):
    masks = extreme_masks(size)
    image, target = rng.uniform(size=(2, len(masks), size, size, 3)).astype(np.float32)

    @jax.jit
    def compute_metrics(image, target, masks):
        bands = [im.inner_band(masks, 1, 9), im.outer_band(masks, 1, 9), im.seam_band(masks, 2)]
        regions = [masks, 1 - masks, *bands]
        return (
            [(im.psnr(image, target, region), im.trimmed_psnr(image, target, region, 0.05)) for region in regions],
            im.edge_difference(image, masks, im.dilate(masks, 8)),
            im.wasserstein(image, *bands[:2]),
        )

    values = jnp.stack(jax.tree.leaves(compute_metrics(image, target, masks)))
    assert np.isfinite(values).all() and values.min() >= 0


def test_metrics_have_the_same_values_under_vmap_and_scan(rng):
    image, target = rng.uniform(size=(2, 3, 2, 16, 16, 3)).astype(np.float32)
    masks = (rng.uniform(size=(3, 2, 16, 16)) > 0.7).astype(np.float32)

    @jax.jit
    def measure(image, target, mask):
        texture = im.masked_mean(jnp.abs(im.laplacian(im.gaussian_blur(image, 1.0))), im.outer_band(mask, 1, 3))
        near = im.wasserstein(image, mask, im.dilate(mask, 2) - mask)
        return texture + near + im.trimmed_psnr(image, target, 1 - mask, 0.05)

    one_by_one = jnp.stack([measure(*each) for each in zip(image, target, masks, strict=True)])
    mapped = jax.vmap(measure)(image, target, masks)
    scanned = jax.jit(lambda *xs: jax.lax.scan(lambda _, x: (None, measure(*x)), None, xs)[1])(image, target, masks)
    np.testing.assert_allclose(mapped, one_by_one, rtol=1e-5)
    np.testing.assert_allclose(scanned, one_by_one, rtol=1e-5)
