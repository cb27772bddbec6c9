"""Image metrics: errors in a region, bands along a mask's edge, gradients, texture, seams.

All are pure functions of batches with static shapes, for use under jit, vmap and scan. Images are [B, h, w, 3] float32
in [0, 1]. Masks and regions are [B, h, w] in {0, 1}, or bool. Distances are in pixels. A diagonal step counts 1, like a
step along a row or column. Images are padded with their outermost pixels. Masks are padded in the same way, so that the
image border is not an edge of a mask. No result is NaN for finite images. The docstrings state the results for empty
regions.
"""

import jax
import jax.numpy as jnp

MSE_FLOOR = 1e-10  # limits the PSNR of equal images and of empty regions to 100 dB


def masked_mean(values: jax.Array, region: jax.Array) -> jax.Array:
    """Compute the mean of values [B, h, w] or [B, h, w, C] over a region and all channels, [B] float32.

    The mean over an empty region is 0.
    """
    region = region.astype(jnp.float32)
    if values.ndim == 4:
        values = values.mean(-1)
    return (values * region).sum((1, 2)) / jnp.maximum(region.sum((1, 2)), 1.0)


def mse(image: jax.Array, target: jax.Array, region: jax.Array) -> jax.Array:
    """Compute the mean squared error over a region's pixels and channels, [B]; 0 if the region is empty."""
    return masked_mean((image - target) ** 2, region)


def decibels(error: jax.Array) -> jax.Array:
    """Compute −10·log10(error), the PSNR [dB] of a mean squared error of images in [0, 1]; at most 100 dB."""
    return -10.0 * jnp.log10(jnp.maximum(error, MSE_FLOOR))


def psnr(image: jax.Array, target: jax.Array, region: jax.Array) -> jax.Array:
    """Compute the PSNR [dB] in a region, 10·log10(1/mse), [B]; at most 100, and 100 if the region is empty."""
    return decibels(mse(image, target, region))


def trimmed_psnr(image: jax.Array, target: jax.Array, region: jax.Array, trim: float) -> jax.Array:
    """Compute the PSNR [dB] of a region without its worst pixels, [B]; 100 if the region is empty.

    `trim` is the fraction of the region's pixels that are left out. If this is not a whole number of pixels, one pixel
    is left out in part. The error of a pixel is the mean square over the channels.
    """
    b, h, w = region.shape
    outside = region.reshape(b, h * w) == 0
    errors = ((image - target) ** 2).mean(-1).reshape(b, h * w)
    ascending = jnp.sort(jnp.where(outside, jnp.inf, errors), axis=1)
    count = (1.0 - trim) * (h * w - outside.sum(1, keepdims=True))
    weights = jnp.clip(count - jnp.arange(h * w), 0.0, 1.0)
    total = jnp.where(weights > 0, weights * ascending, 0.0).sum(1)
    return decibels(total / jnp.maximum(count[:, 0], MSE_FLOOR))


def dilate(mask: jax.Array, pixels: int) -> jax.Array:
    """Add to the mask all pixels within a distance of `pixels` from it, [B, h, w] float32."""
    dilated = mask.astype(jnp.float32)
    for window in ((1, 2 * pixels + 1, 1), (1, 1, 2 * pixels + 1)):
        dilated = jax.lax.reduce_window(dilated, -jnp.inf, jax.lax.max, window, (1, 1, 1), "SAME")
    return dilated


def erode(mask: jax.Array, pixels: int) -> jax.Array:
    """Remove from the mask all pixels within a distance of `pixels` from a pixel outside it, [B, h, w] float32."""
    return 1.0 - dilate(1.0 - mask.astype(jnp.float32), pixels)


def inner_band(mask: jax.Array, near: int, far: int) -> jax.Array:
    """Return the pixels inside the mask, more than `near` and at most `far` from its edge, [B, h, w] float32."""
    return erode(mask, near) - erode(mask, far)


def outer_band(mask: jax.Array, near: int, far: int) -> jax.Array:
    """Return the pixels outside the mask, more than `near` and at most `far` from its edge, [B, h, w] float32."""
    return dilate(mask, far) - dilate(mask, near)


def seam_band(mask: jax.Array, pixels: int) -> jax.Array:
    """Return the pixels within a distance of `pixels` of the mask's edge, on both sides, [B, h, w] float32."""
    return dilate(mask, pixels) - erode(mask, pixels)


def gaussian_blur(image: jax.Array, sigma: float) -> jax.Array:
    """Convolve an image [B, h, w, C] with a Gaussian of σ = `sigma` pixels, truncated at 4σ."""
    radius = max(1, round(4 * sigma))
    kernel = jnp.exp(-0.5 * (jnp.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    # This sums shifted copies, because accelerators may compute a convolution in bfloat16 or TF32.
    for axis in (1, 2):
        size = image.shape[axis]
        padded = _pad(image, axis, radius)
        image = sum(kernel[i] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(2 * radius + 1))
    return image


def gradients(image: jax.Array) -> jax.Array:
    """Compute central differences (x₊₁ − x₋₁)/2 along both axes, [B, h, w, C] -> [B, h, w, 2·C]."""
    return jnp.concatenate([(after - before) / 2.0 for before, after in _neighbors(image)], axis=-1)


def laplacian(image: jax.Array) -> jax.Array:
    """Compute the sum of the four neighbors minus four times the pixel, [B, h, w, C] -> [B, h, w, C]."""
    return sum(before + after - 2.0 * image for before, after in _neighbors(image))


def edge_difference(image: jax.Array, *masks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the mean |difference| of neighboring pixels on two sides of a mask's edge.

    A pair of neighbors along a row or column counts if one of them is in the mask and the other is not.

    Args:
        image: [B, h, w, C].
        *masks: each [B, h, w]. The pairs of all masks are pooled.

    Returns:
        The mean over pairs and channels [B] (0 without pairs), and the number of pairs [B], both float32.
    """
    total = count = jnp.zeros(image.shape[0], jnp.float32)
    for mask in masks:
        mask = mask.astype(jnp.float32)
        for axis in (1, 2):
            is_edge = jnp.abs(jnp.diff(mask, axis=axis))
            total += (is_edge * jnp.abs(jnp.diff(image, axis=axis)).mean(-1)).sum((1, 2))
            count += is_edge.sum((1, 2))
    return total / jnp.maximum(count, 1.0), count


def wasserstein(image: jax.Array, first: jax.Array, second: jax.Array, levels: int = 64) -> jax.Array:
    """Compute the Wasserstein-1 distance of the values in two regions of an image, mean over channels, [B] in [0, 1].

        W1 = ∫ |F(x) − G(x)| dx

    F and G are the distribution functions of a channel's values in the first and the second region. The integral is
    computed as a sum over `levels` cells of [0, 1], with F and G averaged in each cell. The sum is exact if F − G does
    not change its sign within a cell. The distance is 0 if either region is empty.
    """
    both_nonempty = (first.sum((1, 2)) > 0) & (second.sum((1, 2)) > 0)

    def cell_difference(i):
        below = jnp.clip(i + 1.0 - levels * image, 0.0, 1.0)  # share of cell i that is above the pixel's value
        return jnp.stack(
            [masked_mean(below[..., c], first) - masked_mean(below[..., c], second) for c in range(image.shape[-1])]
        )

    difference = jax.lax.map(cell_difference, jnp.arange(levels))  # [levels, C, B]
    return jnp.where(both_nonempty, jnp.abs(difference).mean((0, 1)), 0.0)


def _pad(image: jax.Array, axis: int, pixels: int) -> jax.Array:
    width = [(pixels, pixels) if a == axis else (0, 0) for a in range(image.ndim)]
    return jnp.pad(image, width, mode="edge")


def _neighbors(image: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Return the images of preceding and following pixels, (before, after), along axis 1 and along axis 2."""
    pairs = []
    for axis in (1, 2):
        padded, size = _pad(image, axis, 1), image.shape[axis]
        pairs.append(tuple(jax.lax.slice_in_dim(padded, start, start + size, axis=axis) for start in (0, 2)))
    return pairs
