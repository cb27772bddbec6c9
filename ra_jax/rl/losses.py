"""The clipped policy loss and the losses beside it. Means are over records, weighed and summed over all devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ra_jax.flow.path import velocity_target
from ra_jax.flow.regions import region_mean
from ra_jax.rl.advantages import ADVANTAGE_LIMIT

LOG_RATIO_LIMIT = 3.0

Mean = Callable[[jax.Array], jax.Array]


def clipped_policy_loss(
    log_ratio: jax.Array,
    advantages: jax.Array,
    *,
    clip_range: float,
    mean: Mean = jnp.mean,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's clipped surrogate (Schulman et al. 1707.06347, eq. 7) as a loss to be minimised.

        ρ = exp(clip(log_ratio, ±3))        policy = mean( max(−A·ρ, −A·clip(ρ, 1 − ε, 1 + ε)) )

    log_ratio: ℓ_θ − ℓ_old, [B] float32; advantages: [B], into which no gradient flows. `mean` averages over the
    global batch. Metrics: mean_ratio; clip_fraction, where |ρ − 1| > ε; approx_kl = mean(ρ − 1 − log ρ) ≥ 0.
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
    """DiffusionNFT's contrast of a better and a worse policy (Zheng et al. 2509.16117, eq. 5), [R] float32.

        (1/β)·mean_Ω [ r·‖v⁺ − v*‖² + (1 − r)·‖v⁻ − v*‖² ]        v± = (1 ∓ β)·v_old ± β·v_θ

    so that v_θ moves from v_old towards the velocity of images with r > ½, away from it with r < ½; the division makes
    the first step's gradient that of (2r − 1)·2⟨v_θ, v_old − v*⟩, whatever β. β weighs the pull back to v_old.

    predicted, old, target: [R, N, 4C]; region: [R, N, 4]; optimality: r [R] in [0, 1]. No gradient flows into `old`.
    """
    old = jax.lax.stop_gradient(old)
    better = (1.0 - beta) * old + beta * predicted
    worse = (1.0 + beta) * old - beta * predicted
    better, worse = (region_mean((v - target) ** 2, region) for v in (better, worse))
    return (optimality * better + (1.0 - optimality) * worse) / beta


def optimality(advantages: jax.Array) -> jax.Array:
    """r = ½ + ½·clip(A/5, ±1), in [0, 1]: how much an image belongs to the better half."""
    return 0.5 + 0.5 * jnp.clip(advantages / ADVANTAGE_LIMIT, -1.0, 1.0)


def flow_matching_error(predicted: jax.Array, clean: jax.Array, noise: jax.Array, region: jax.Array) -> jax.Array:
    """mean_Ω ‖v − (ε − x0)‖² of each record, [B] float32 (Lipman et al. 2210.02747, eq. 21).

    predicted, clean, noise: [B, N, 4C]; region: `region_weights` [B, N, 4].
    """
    return region_mean((predicted - velocity_target(clean, noise)) ** 2, region)


def next_temperature(temperature: jax.Array, clip_fraction: jax.Array) -> jax.Array:
    """τ ← τ·exp(0.1·(clip_fraction − 0.15)): a policy that clips too often is judged at a higher temperature."""
    return temperature * jnp.exp(0.1 * (clip_fraction - 0.15))
