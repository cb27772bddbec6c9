"""The clipped policy loss and the losses beside it. Means are over records, weighed and summed over all devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ra_jax.flow.path import velocity_target
from ra_jax.flow.regions import region_mean

LOG_RATIO_LIMIT = 3.0

Mean = Callable[[jax.Array], jax.Array]


def clipped_policy_loss(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantages: jax.Array,
    *,
    clip_range: float,
    mean: Mean = jnp.mean,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's clipped surrogate (Schulman et al. 1707.06347, eq. 7) as a loss to be minimised.

        ρ = exp(clip(ℓ_θ − ℓ_old, ±3))        policy = mean( max(−A·ρ, −A·clip(ρ, 1 − ε, 1 + ε)) )

    All arguments are [B], float32; no gradient flows into `old_log_prob` or `advantages`. `mean` averages over the
    global batch. Metrics: mean_ratio; clip_fraction, where |ρ − 1| > ε; approx_kl = mean(ρ − 1 − log ρ) ≥ 0.
    """
    log_ratio = log_prob - jax.lax.stop_gradient(old_log_prob)
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


def flow_matching_error(predicted: jax.Array, clean: jax.Array, noise: jax.Array, region: jax.Array) -> jax.Array:
    """mean_Ω ‖v − (ε − x0)‖² of each record, [B] float32 (Lipman et al. 2210.02747, eq. 21).

    predicted, clean, noise: [B, N, 4C]; region: `region_weights` [B, N, 4].
    """
    return region_mean((predicted - velocity_target(clean, noise)) ** 2, region)


def adapted_temperature(temperature: jax.Array, clip_fraction: jax.Array) -> jax.Array:
    """τ ← τ·exp(0.1·(clip_fraction − 0.15)): a policy that clips too often is judged at a higher temperature."""
    return temperature * jnp.exp(0.1 * (clip_fraction - 0.15))
