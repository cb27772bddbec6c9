import numpy as np
import pytest

from ra_jax.evaluation.structural import mean_ssim, ssim_map


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    first = rng.random((17, 20, 3))
    return first, np.clip(0.7 * first + 0.3 * rng.random(first.shape), 0.0, 1.0)


def window_by_window(first, second):
    """Computes SSIM by the paper's formula: weighted means, variances and covariance of each 11 × 11 window."""
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    weights = (weights / weights.sum())[..., None]
    height, width = first.shape[0] - 10, first.shape[1] - 10
    similarity = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            a, b = (x[i : i + 11, j : j + 11] for x in (first, second))
            mean_a, mean_b = ((weights * x).sum((0, 1)) for x in (a, b))
            var_a, var_b = ((weights * (x - m) ** 2).sum((0, 1)) for x, m in ((a, mean_a), (b, mean_b)))
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum((0, 1))
            luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            structure = (2 * covariance + 9e-4) / (var_a + var_b + 9e-4)
            similarity[i, j] = (luminance * structure).mean()
    return similarity


def test_the_formula_window_by_window(pictures):
    np.testing.assert_allclose(ssim_map(*pictures), window_by_window(*pictures), atol=1e-12)


def test_dm_pix_agrees(pictures):
    dm_pix = pytest.importorskip("dm_pix")
    first, second = (np.asarray(picture, np.float32) for picture in pictures)
    assert mean_ssim(ssim_map(first, second)) == pytest.approx(float(dm_pix.ssim(first, second)), abs=1e-5)


def test_equal_pictures_are_1_and_inverted_ones_below_0(pictures):
    first, _ = pictures
    np.testing.assert_allclose(ssim_map(first, first), 1.0)
    assert mean_ssim(ssim_map(first, 1.0 - first)) < 0.0


def test_a_region_counts_the_windows_centered_in_it(pictures):
    similarity = ssim_map(*pictures)
    region = np.zeros((17, 20), bool)
    region[6, 7] = True
    assert mean_ssim(similarity, region) == similarity[1, 2]
    assert mean_ssim(similarity, np.ones((17, 20), bool)) == pytest.approx(mean_ssim(similarity))


def test_no_window_no_value(pictures):
    first, second = pictures
    border = np.ones((17, 20), bool)
    border[5:-5, 5:-5] = False
    assert mean_ssim(ssim_map(first, second), border) is None
    for height, width in ((10, 20), (17, 4), (3, 3)):
        small = ssim_map(first[:height, :width], second[:height, :width])
        assert mean_ssim(small, np.ones((height, width), bool)) is None
        assert mean_ssim(small) is None
