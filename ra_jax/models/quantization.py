"""Kernels in 8 bits: a frozen base of half the size, for cards that do not hold it otherwise."""

import numpy as np

LEVELS = 127


def quantize(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel [in, out] as int8 and a float32 scale for each output [out], so that kernel ≈ int8 · scale.

        scale = max_in |kernel| / 127        int8 = round(kernel / scale)

    (absmax quantisation by output channel, Dettmers et al. 2208.07339 without its outliers.) No value is off by more
    than scale / 2; of a normal kernel with 3,072 inputs that is a root mean square error of about 0.9 %.
    """
    scale = np.abs(kernel).max(0).astype(np.float32) / LEVELS
    scale = np.where(scale > 0, scale, np.float32(1.0))
    return np.rint(kernel / scale).astype(np.int8), scale
