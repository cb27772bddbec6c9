"""The policy losses (PPO's clipped surrogate, its anchored form, DiffusionNFT's loss) and the flow-matching error.

A function that averages over samples takes `mean`, the mean over the global batch on all devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ra_jax.flow.path import velocity_target
from ra_jax.flow.regions import region_mean
from ra_jax.rl.advantages import ADVANTAGE_LIMIT
from ra_jax.rl.strength import PolicyStrength

LOG_RATIO_LIMIT = 3.0  # ρ stays below e³

Mean = Callable[[jax.Array], jax.Array]


def clipped_policy_loss(
    log_ratio: jax.Array,
    advantages: jax.Array,
    *,
    clip_range: float,
    mean: Mean = jnp.mean,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute PPO's clipped surrogate (Schulman et al. 1707.06347, eq. 7), negated so that it is minimized.

        ρ = exp(min(ℓ_θ − ℓ_old, 3))        loss = mean( max(−A·ρ, −A·clip(ρ, 1 − ε, 1 + ε)) )

    The log-ratio is cut upwards only. A lower bound would take the gradient from good samples that became improbable.

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
    log_ratio = jnp.minimum(log_ratio, LOG_RATIO_LIMIT)
    ratio = jnp.exp(log_ratio)
    loss, metrics = _clipped_surrogate(ratio, advantages, clip_range, mean, center=1.0)
    return loss, metrics | jax.lax.stop_gradient({"approx_kl": mean(ratio - 1.0 - log_ratio)})


def contrast_policy_loss(
    log_ratio: jax.Array,
    advantages: jax.Array,
    anchor: jax.Array,
    strength: PolicyStrength,
    *,
    clip_range: float,
    temperature: jax.Array | float,
    mean: Mean = jnp.mean,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the loss of the estimator `contrast`: a clipped surrogate to first order, and an anchor.

        ρ = 1 + (ℓ_θ − ℓ_old)
        loss = κ·[ τ·mean( A + max(−A·ρ, −A·clip(ρ, 1 − ε, 1 + ε)) ) + b·mean(anchor) ]

    ℓ is `estimators.contrast_log_prob`, which is linear in v_θ. The first term of a sample is therefore convex and
    piecewise linear in v_θ for either sign of A, and its gradient has at most the size 2κ|A|·‖u‖. With an anchor that
    is quadratic in v_θ, the loss has a minimum. At ρ = 1 it is at v_θ = v_ref + (1/b)·E[A·u | x_t]. Without the clip
    the loss is the regression κb·‖v_θ − [v_ref + (A/b)·u]‖², up to a constant. Its solution is the optimal velocity of
    KL-constrained reward maximization, to first order (FlowAWR, 2606.30376).

    τ cancels wherever ρ is not clipped: it is only the unit in which ε is measured.

    A has no gradient. It is added so that the loss is 0 at ρ = 1 for v_θ = v_ref, and it is not computed: the surrogate
    takes ρ − 1 in place of ρ. Otherwise the rounding of 1 + x, times A, would hide the small differences of a step.

    Args:
        log_ratio: ℓ_θ − ℓ_old, [B] float32.
        advantages: A [B]; no gradient flows into them.
        anchor: distance of the current policy from the reference, [B].
        strength: κ (`pull`) and b (`anchor`).
        clip_range: ε.
        temperature: τ.
        mean: mean over the global batch.

    Returns:
        The loss, a scalar.
        The metrics, which have no gradient: mean_ratio and clip_fraction as in `clipped_policy_loss`, and
            approx_kl: ½·mean((ℓ_θ − ℓ_old)²).
            reference_distance: mean of the anchor.
    """
    surrogate, metrics = _clipped_surrogate(log_ratio, advantages, clip_range, mean)
    distance = mean(anchor)
    metrics |= jax.lax.stop_gradient({"approx_kl": 0.5 * mean(log_ratio**2), "reference_distance": distance})
    return strength.pull * (temperature * surrogate + strength.anchor * distance), metrics


def _clipped_surrogate(
    x: jax.Array, advantages: jax.Array, clip_range: float, mean: Mean, *, center: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute mean( max(−A·x, −A·clip(x, c − ε, c + ε)) ), and the metrics mean_ratio and clip_fraction.

    x is the ratio plus c − 1: with the center c = 1 it is ρ, with c = 0 it is ρ − 1.
    """
    advantages = jax.lax.stop_gradient(advantages)
    clipped = jnp.clip(x, center - clip_range, center + clip_range)
    loss = mean(jnp.maximum(-advantages * x, -advantages * clipped))
    metrics = {
        "mean_ratio": mean(x) + (1.0 - center),
        "clip_fraction": mean((jnp.abs(x - center) > clip_range).astype(jnp.float32)),
    }
    return loss, jax.lax.stop_gradient(metrics)


def nft_loss(
    predicted: jax.Array, center: jax.Array, target: jax.Array, region: jax.Array, optimality: jax.Array, beta: float
) -> jax.Array:
    """Compute DiffusionNFT's contrast of a better and a worse policy (Zheng et al. 2509.16117, eq. 5), [R] float32.

        L = (1/β)·mean_Ω [ r·‖v⁺ − v*‖² + (1 − r)·‖v⁻ − v*‖² ]        v± = (1 ∓ β)·v_c ± β·v_θ

    With d = v_θ − v_c, L equals mean_Ω [ (2r − 1)·2⟨d, v_c − v*⟩ + β·‖d‖² ] up to a constant. The first term moves v_θ
    from v_c towards the image's velocity v* if r > ½, and away from v* if r < ½. It does not depend on β, because L is
    divided by β. At v_θ = v_c only the first term has a gradient. The second term pulls v_θ back to v_c.

    In the paper v_c is the old policy's velocity. It then moves along with the policy, and nothing bounds the sum of
    its moves. If v_c is a fixed reference, the minimum is at v_θ = v_c + (1/β)·E[(2r − 1)·(v* − v_c) | x_t].

    Args:
        predicted: v_θ [R, N, 4C].
        center: v_c [R, N, 4C]; no gradient flows into it.
        target: v* = ε − x0 [R, N, 4C].
        region: weights of mean_Ω [R, N, 4].
        optimality: r [R] in [0, 1].
        beta: β > 0.
    """
    center = jax.lax.stop_gradient(center)
    better = (1.0 - beta) * center + beta * predicted
    worse = (1.0 + beta) * center - beta * predicted
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
    """Adapt the temperature: τ ← τ·exp(½·(clip_fraction − 0.15)). A higher τ keeps ρ closer to 1."""
    return temperature * jnp.exp(0.5 * (clip_fraction - 0.15))
