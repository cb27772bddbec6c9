"""SSIM, structural similarity, as a map that can be averaged over a region.

Wang, Bovik, Sheikh & Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
Transactions on Image Processing 13(4), 2004.
"""

import numpy as np
from scipy.ndimage import correlate1d

WINDOW = 11  # pixels, of the Gaussian window
SIGMA = 1.5
HALF = WINDOW // 2
K1, K2 = 0.01, 0.03


def ssim_map(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """SSIM of every window, the mean of the colour channels (equation 13, range of values L = 1):

        (2·μ1·μ2 + C1)(2·σ12 + C2) / ((μ1² + μ2² + C1)(σ1² + σ2² + C2)),   C1 = 0.01², C2 = 0.03²

    with means, variances and covariance under an 11 × 11 Gaussian of σ = 1.5 px that lies wholly in the picture.
    In NumPy, since a compiled program would be compiled anew for each size of photo.

    first, second: [h, w, 3] in [0, 1]. Returns [h − 10, w − 10] float64 in [−1, 1]: element (i, j) is the window
    centred on pixel (i + 5, j + 5); empty where the picture is smaller than a window.
    """
    total = np.zeros([max(0, side - 2 * HALF) for side in first.shape[:2]])
    if not total.size:
        return total
    for channel in range(first.shape[2]):
        total += _channel_map(*(image[..., channel].astype(np.float64) for image in (first, second)))
    return total / first.shape[2]


def mean_ssim(similarity: np.ndarray, region: np.ndarray | None = None) -> float | None:
    """Mean of `ssim_map`'s result over the windows centred in `region` [h, w] bool (None: over all of them).

    None where no window is centred there.
    """
    chosen = similarity if region is None else similarity[region[HALF:-HALF, HALF:-HALF]]
    return float(chosen.mean()) if chosen.size else None


def _channel_map(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    mean1, mean2 = _windowed(first), _windowed(second)
    variance1 = np.maximum(_windowed(first**2) - mean1**2, 0.0)  # rounding would leave flat areas a little below 0
    variance2 = np.maximum(_windowed(second**2) - mean2**2, 0.0)
    covariance = _windowed(first * second) - mean1 * mean2
    c1, c2 = K1**2, K2**2
    likeness = (2.0 * mean1 * mean2 + c1) * (2.0 * covariance + c2)
    return likeness / ((mean1**2 + mean2**2 + c1) * (variance1 + variance2 + c2))


def _windowed(values: np.ndarray) -> np.ndarray:
    at = np.arange(WINDOW) - HALF
    weights = np.exp(-0.5 * (at / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        values = correlate1d(values, weights, axis=axis, mode="constant")
    return values[HALF:-HALF, HALF:-HALF]
