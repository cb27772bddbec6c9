"""SSIM (structural similarity) as a map, and its mean over a region.

Wang, Bovik, Sheikh & Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
Transactions on Image Processing 13(4), 2004.
"""

import numpy as np
from scipy.ndimage import correlate1d

WINDOW = 11  # side of the Gaussian window [pixels]
SIGMA = 1.5  # standard deviation of the Gaussian window [pixels]
HALF = WINDOW // 2  # pixels of the window on each side of its center
K1, K2 = 0.01, 0.03  # constants of the paper: C1 = K1², C2 = K2² for images in [0, 1]


def ssim_map(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute the SSIM of every window, averaged over the color channels (equation 13 with the value range L = 1).

        (2·μ1·μ2 + C1)(2·σ12 + C2) / ((μ1² + μ2² + C1)(σ1² + σ2² + C2)),   C1 = 0.01², C2 = 0.03²

    Means, variances and covariance are weighted by an 11 × 11 Gaussian of σ = 1.5 px that lies entirely inside the
    image. This is NumPy code, because JAX would compile the function for each image size.

    Args:
        first: [h, w, 3] in [0, 1].
        second: [h, w, 3] in [0, 1].

    Returns:
        [h − 10, w − 10] float64 in [−1, 1]. Element (i, j) is the SSIM of the window centered at pixel (i + 5, j + 5).
        The map is empty if the image is smaller than a window.
    """
    total = np.zeros([max(0, side - 2 * HALF) for side in first.shape[:2]])
    if not total.size:
        return total
    for channel in range(first.shape[2]):
        total += _channel_ssim(*(image[..., channel].astype(np.float64) for image in (first, second)))
    return total / first.shape[2]


def mean_ssim(similarity: np.ndarray, region: np.ndarray | None = None) -> float | None:
    """Average the result of `ssim_map` over the windows that are centered in `region` [h, w] bool.

    If `region` is None, average over all windows. Return None if there is no window to average over.
    """
    selected = similarity if region is None else similarity[region[HALF:-HALF, HALF:-HALF]]
    return float(selected.mean()) if selected.size else None


def _channel_ssim(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    mean1, mean2 = _window_mean(first), _window_mean(second)
    variance1 = np.maximum(_window_mean(first**2) - mean1**2, 0.0)  # rounding can make it negative in flat areas
    variance2 = np.maximum(_window_mean(second**2) - mean2**2, 0.0)
    covariance = _window_mean(first * second) - mean1 * mean2
    c1, c2 = K1**2, K2**2
    numerator = (2.0 * mean1 * mean2 + c1) * (2.0 * covariance + c2)
    return numerator / ((mean1**2 + mean2**2 + c1) * (variance1 + variance2 + c2))


def _window_mean(values: np.ndarray) -> np.ndarray:
    offsets = np.arange(WINDOW) - HALF
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        values = correlate1d(values, weights, axis=axis, mode="constant")
    return values[HALF:-HALF, HALF:-HALF]
