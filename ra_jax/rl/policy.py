"""Policy loss per estimator: the log-probability of samples under the policy, and the loss against the old policy.

`policy_cache` returns the points (x_t, t) at which both policies are evaluated. `evaluate_policy` computes the terms of
a policy at these points, such as the log-probability. `policy_loss` compares the terms of the current policy with the
terms of the old policy. Both policies run the same graph, so that equal parameters give equal terms.

Shapes: B samples, N packed latent tokens of 4C features, and R rows. Each row is a point of a sample. contrast,
matching and nft have R = B·P rows, for K pairs (t, ε) and perhaps one more point of the anchor. sde has R = B·W rows
for W noisy steps. The rows of a sample are adjacent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ra_jax.flow.regions import region_mean
from ra_jax.rl.estimators import (
    MatchingCache,
    PolicyVelocity,
    TransitionCache,
    contrast_log_prob,
    matching_cache,
    matching_log_prob,
    normalized_log_ratio,
    repeat_rows,
    sde_log_prob,
)
from ra_jax.rl.losses import Mean, clipped_policy_loss, contrast_policy_loss, nft_loss, optimality
from ra_jax.rl.rollouts import Sample
from ra_jax.rl.strength import PolicyStrength

OldPolicy = dict[str, jax.Array]  # `PolicyOutput.terms` of the old policy


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Settings of the policy estimators.

    Attributes:
        estimator: "contrast", "matching", "sde" or "nft".
        clip_range: ε of `contrast_policy_loss`, and of `clipped_policy_loss` for matching.
        num_pairs: K, the number of pairs (t, ε) of contrast, matching and nft.
        time_fraction: f; t is drawn from [1 − f, 1], the noisiest part of the schedule (contrast, matching, nft).
        anchor_rest: whether the anchor of contrast has one more point per sample, with t below 1 − f. It is needed if
            no base loss holds the policy there.
        pull_temperature: τ₀ of matching. The loss is multiplied by τ/τ₀, so that the gradient does not depend on τ
            (with `sample` routing that of the velocity; that of the drawn gate then follows τ). None: it is not
            multiplied.
        noise_level: η of the stochastic sampler (sde).
        sde_clip_range: ε of `clipped_policy_loss` for sde.
        nft_beta: β of `nft_loss`.
        nft_about: the center of `nft_loss`, "reference" or "old".
    """

    estimator: str
    clip_range: float
    num_pairs: int
    time_fraction: float
    anchor_rest: bool
    pull_temperature: float | None
    noise_level: float
    sde_clip_range: float
    nft_beta: float
    nft_about: str

    @property
    def uses_reference(self) -> bool:
        """Whether the loss depends on the reference's velocity."""
        return self.estimator == "contrast" or (self.estimator == "nft" and self.nft_about == "reference")


@dataclass(frozen=True)
class PolicyOutput:
    """Output of a policy on B samples.

    Attributes:
        terms: arrays that `policy_loss` compares with the same arrays of the old policy.
            contrast, matching: log_prob ℓ [B], and routing [B], the log-probability of the sampled expert.
            sde: log_prob, routing, and mean μ_θ [R, N, 4C].
            nft: velocity v_θ [R, N, 4C].
        velocity: v_θ [R, N, 4C].
        cache: the points at which the policy was evaluated.
        anchor: distance from the reference [B]; None unless the estimator is contrast.
        std: standard deviation of each noisy step [R]; None unless the estimator is sde.
    """

    terms: OldPolicy
    velocity: jax.Array
    cache: MatchingCache | TransitionCache
    anchor: jax.Array | None = None
    std: jax.Array | None = None


def policy_cache(
    sample: Sample, keys: jax.Array, region: jax.Array, settings: PolicySettings
) -> MatchingCache | TransitionCache:
    """Return the points at which the current and the old policy are compared on these samples.

    Args:
        sample: B samples. sde reads their trajectory, the other estimators their clean latents.
        keys: [B], equal within a group. The pairs (t, ε) are drawn from them (contrast, matching, nft).
        region: weights of mean_Ω [B, N, 4].
        settings: the estimator and its parameters.
    """
    if settings.estimator == "sde":
        return TransitionCache(sample.states, sample.times, region, settings.noise_level)
    return matching_cache(
        keys,
        sample.clean,
        region,
        count=settings.num_pairs,
        fraction=settings.time_fraction,
        with_rest=settings.anchor_rest,
    )


def evaluate_policy(
    velocity: PolicyVelocity,
    params: Any,
    cache: MatchingCache | TransitionCache,
    settings: PolicySettings,
    *,
    temperature: jax.Array | float,
    routing_log_prob: jax.Array | None = None,
) -> PolicyOutput:
    """Evaluate the policy with parameters `params` at the points of `policy_cache`.

    Args:
        velocity: function (params, x [R, N, 4C], t [R]) -> v_θ [R, N, 4C].
        params: θ.
        cache: from `policy_cache`. contrast also needs its `reference`.
        settings: the estimator and its parameters.
        temperature: τ of contrast and matching.
        routing_log_prob: log w_e [B] of the expert that was drawn for each sample. It is part of the sample's
            log-probability and adds to the log-ratio. None (counts as 0) without `sample` routing.
    """
    routing = jnp.zeros(cache.region.shape[:1]) if routing_log_prob is None else routing_log_prob
    if settings.estimator == "sde":
        log_prob, mean, std, predicted = sde_log_prob(velocity, params, cache)
        return PolicyOutput({"log_prob": log_prob, "mean": mean, "routing": routing}, predicted, cache, std=std)
    if settings.estimator == "contrast":
        log_prob, distance, predicted = contrast_log_prob(
            velocity, params, cache, temperature=temperature, fraction=settings.time_fraction
        )
        # In units of τ, like the velocity's part of ℓ, so that the pull on the gates does not depend on τ either.
        terms = {"log_prob": log_prob, "routing": routing / temperature}
        return PolicyOutput(terms, predicted, cache, anchor=distance)
    log_prob, predicted = matching_log_prob(velocity, params, cache, temperature=temperature)
    terms = {"velocity": predicted} if settings.estimator == "nft" else {"log_prob": log_prob, "routing": routing}
    return PolicyOutput(terms, predicted, cache)


def policy_loss(
    output: PolicyOutput,
    old: OldPolicy,
    advantages: jax.Array,
    settings: PolicySettings,
    *,
    temperature: jax.Array | float,
    strength: PolicyStrength | None = None,
    mean: Mean = jnp.mean,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the policy loss of B samples (a scalar) and its metrics.

        contrast  `contrast_policy_loss` of the log-ratio ℓ_θ − ℓ_old, with the pull and the anchor of `strength`
        matching  `clipped_policy_loss` of the log-ratio ℓ_θ − ℓ_old
        sde       `clipped_policy_loss` of the normalized log-ratio (`normalized_log_ratio`)
        nft       `nft_loss`; the metric policy_change is the mean of mean_Ω ‖v_θ − v_c‖²

    contrast, matching and sde add the log-ratio of the sampled experts, log w_e − log w_e,old (contrast divides it
    by τ).

    Args:
        output: the current policy's output on the samples.
        old: the old policy's terms on the same samples; no gradient flows into them.
        advantages: A [B].
        settings: the estimator and its parameters.
        temperature: τ of contrast and matching.
        strength: κ and b of contrast.
        mean: mean over the global batch.
    """
    old, terms = jax.lax.stop_gradient(old), output.terms
    if settings.estimator == "nft":
        center = old["velocity"] if settings.nft_about == "old" else output.cache.reference
        return _nft_policy_loss(output, center, advantages, settings, mean)
    # The subtraction comes first. Equal terms then give exactly 0, however the compiler reorders the later operations.
    log_ratio, clip_range = terms["log_prob"] - old["log_prob"], settings.clip_range
    if settings.estimator == "sde":
        log_ratio = normalized_log_ratio(log_ratio, terms["mean"], old["mean"], output.std, output.cache.region)
        clip_range = settings.sde_clip_range
    log_ratio = log_ratio + (terms["routing"] - old["routing"])
    if settings.estimator == "contrast":
        return contrast_policy_loss(
            log_ratio,
            advantages,
            output.anchor,
            strength,
            clip_range=clip_range,
            temperature=temperature,
            mean=mean,
        )
    loss, metrics = clipped_policy_loss(log_ratio, advantages, clip_range=clip_range, mean=mean)
    if settings.estimator == "matching" and settings.pull_temperature is not None:
        loss *= temperature / settings.pull_temperature
    return loss, metrics


def _nft_policy_loss(
    output: PolicyOutput, center: jax.Array, advantages: jax.Array, settings: PolicySettings, mean: Mean
) -> tuple[jax.Array, dict[str, jax.Array]]:
    cache = output.cache
    region, row_optimality = (repeat_rows(x, cache.num_points) for x in (cache.region, optimality(advantages)))
    losses = nft_loss(output.velocity, center, cache.target(), region, row_optimality, beta=settings.nft_beta)
    change = jax.lax.stop_gradient(cache.mean((output.velocity - center) ** 2))
    return mean(losses.reshape(change.shape).mean(1)), {"policy_change": mean(change.mean(1))}


def velocity_distance(
    velocity: jax.Array, reference: jax.Array, region: jax.Array, mean: Callable = jnp.mean
) -> jax.Array:
    """Compute the mean over all points of mean_Ω ‖v − v_ref‖² (a scalar).

    Args:
        velocity: v [R, N, 4C]. Each record has R/B adjacent rows.
        reference: v_ref [R, N, 4C]; no gradient flows into it.
        region: weights of mean_Ω [B, N, 4].
        mean: mean over the global batch.
    """
    squared_difference = (velocity - jax.lax.stop_gradient(reference)) ** 2
    return mean(region_mean(squared_difference, repeat_rows(region, len(velocity) // len(region))))


def norm_ratio(velocity: jax.Array, base: jax.Array, region: jax.Array) -> jax.Array:
    """Compute √(mean_Ω ‖v‖² / mean_Ω ‖v_base‖²) [R] of velocities [R, N, 4C], with `region` [R, N, 4] for mean_Ω."""
    return jnp.sqrt(region_mean(velocity**2, region) / region_mean(base**2, region))


def norm_excess(velocity: jax.Array, reference: jax.Array, region: jax.Array, mean: Callable = jnp.mean) -> jax.Array:
    """Compute the mean over all points of max(‖v‖/‖v_ref‖ − 1, 0)² (a scalar); see `norm_ratio`.

    Reinforcement by the forward process makes velocities longer (NormGuard, 2606.27771). Shorter ones cost nothing.
    The arguments are those of `velocity_distance`.
    """
    rows = repeat_rows(region, len(velocity) // len(region))
    ratio = norm_ratio(velocity, jax.lax.stop_gradient(reference), rows)
    return mean(jnp.maximum(ratio - 1.0, 0.0) ** 2)
