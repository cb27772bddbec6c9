"""The policy losses (PPO's clipped surrogate, DiffusionNFT's contrast) and the flow-matching error.

A function that averages over samples takes `mean`, the mean over the global batch on all devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ra_jax.flow.path import velocity_target
from ra_jax.flow.regions import region_mean
from ra_jax.rl.advantages import ADVANTAGE_LIMIT

LOG_RATIO_LIMIT = 3.0  # ρ stays in [e⁻³, e³]

Mean = Callable[[jax.Array], jax.Array]


def clipped_policy_loss(
    log_ratio: jax.Array,
    advantages: jax.Array,
    *,
    clip_range: float,
    mean: Mean = jnp.mean,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute PPO's clipped surrogate (Schulman et al. 1707.06347, eq. 7), negated so that it is minimized.

        ρ = exp(clip(ℓ_θ − ℓ_old, ±3))        loss = mean( max(−A·ρ, −A·clip(ρ, 1 − ε, 1 + ε)) )

    Args:
        log_ratio: ℓ_θ − ℓ_old, [B] float32.
        advantages: A [B]; no gradient flows into them.
        clip_range: ε.
        mean: mean over the global batch.

    Returns:
        The loss, a scalar.
        The metrics, which have no gradient:
            mean_ratio: mean of ρ.
            clip_fraction: fraction of samples with |ρ − 1| > ε.
            approx_kl: mean(ρ − 1 − log ρ), at least 0.
    """
    log_ratio = jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = jnp.exp(log_ratio)
    advantages = jax.lax.stop_gradient(advantages)
    clipped = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    loss = mean(jnp.maximum(-advantages * ratio, -advantages * clipped))
    metrics = {
        "mean_ratio": mean(ratio),
        "clip_fraction": mean((jnp.abs(ratio - 1.0) > clip_range).astype(jnp.float32)),
        "approx_kl": mean(ratio - 1.0 - log_ratio),
    }
    return loss, jax.lax.stop_gradient(metrics)


def nft_loss(
    predicted: jax.Array, old: jax.Array, target: jax.Array, region: jax.Array, optimality: jax.Array, beta: float
) -> jax.Array:
    """Compute DiffusionNFT's contrast of a better and a worse policy (Zheng et al. 2509.16117, eq. 5), [R] float32.

        L = (1/β)·mean_Ω [ r·‖v⁺ − v*‖² + (1 − r)·‖v⁻ − v*‖² ]        v± = (1 ∓ β)·v_old ± β·v_θ

    With d = v_θ − v_old, L equals mean_Ω [ (2r − 1)·2⟨d, v_old − v*⟩ + β·‖d‖² ] up to a constant. The first term moves
    v_θ from v_old towards the image's velocity v* if r > ½, and away from v* if r < ½. It does not depend on β, because
    L is divided by β. At v_θ = v_old only the first term has a gradient. The second term pulls v_θ back to v_old.

    Args:
        predicted: v_θ [R, N, 4C].
        old: v_old [R, N, 4C]; no gradient flows into it.
        target: v* = ε − x0 [R, N, 4C].
        region: weights of mean_Ω [R, N, 4].
        optimality: r [R] in [0, 1].
        beta: β > 0.
    """
    old = jax.lax.stop_gradient(old)
    better = (1.0 - beta) * old + beta * predicted
    worse = (1.0 + beta) * old - beta * predicted
    better_error, worse_error = (region_mean((v - target) ** 2, region) for v in (better, worse))
    return (optimality * better_error + (1.0 - optimality) * worse_error) / beta


def optimality(advantages: jax.Array) -> jax.Array:
    """Map advantages A to r = ½ + ½·clip(A/5, ±1) in [0, 1], the weight of the better policy in `nft_loss`."""
    return 0.5 + 0.5 * jnp.clip(advantages / ADVANTAGE_LIMIT, -1.0, 1.0)


def flow_matching_error(predicted: jax.Array, clean: jax.Array, noise: jax.Array, region: jax.Array) -> jax.Array:
    """Compute mean_Ω ‖v − (ε − x0)‖² of each row, [B] float32 (flow matching, Lipman et al. 2210.02747, eq. 21).

    Args:
        predicted: velocity v [B, N, 4C].
        clean: x0 [B, N, 4C].
        noise: ε [B, N, 4C].
        region: `region_weights`, weights of mean_Ω [B, N, 4].
    """
    return region_mean((predicted - velocity_target(clean, noise)) ** 2, region)


def next_temperature(temperature: jax.Array, clip_fraction: jax.Array) -> jax.Array:
    """Adapt the temperature: τ ← τ·exp(0.1·(clip_fraction − 0.15)). A higher τ keeps ρ closer to 1."""
    return temperature * jnp.exp(0.1 * (clip_fraction - 0.15))
