"""Policy loss per estimator: the log-probability of samples under the policy, and the loss against the old policy.

`policy_cache` returns the points (x_t, t) at which both policies are evaluated. `evaluate_policy` computes the terms of
a policy at these points, such as the log-probability. `policy_loss` compares the terms of the current policy with the
terms of the old policy. Both policies run the same graph, so that equal parameters give equal terms.

Shapes: B samples, N packed latent tokens of 4C features, and R rows. Each row is a point of a sample. matching and nft
have R = B·K rows for K pairs (t, ε), and sde has R = B·W rows for W noisy steps. The rows of a sample are adjacent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ra_jax.flow.path import velocity_target
from ra_jax.flow.regions import region_mean
from ra_jax.rl.estimators import (
    MatchingCache,
    PolicyVelocity,
    TransitionCache,
    matching_cache,
    matching_log_prob,
    normalized_log_ratio,
    repeat_rows,
    sde_log_prob,
)
from ra_jax.rl.losses import Mean, clipped_policy_loss, nft_loss, optimality
from ra_jax.rl.rollouts import Sample

OldPolicy = dict[str, jax.Array]  # `PolicyOutput.terms` of the old policy


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Settings of the policy estimators.

    Attributes:
        estimator: "matching", "sde" or "nft".
        clip_range: ε of `clipped_policy_loss` for matching.
        num_pairs: K, the number of pairs (t, ε) of matching and nft.
        time_fraction: t is drawn from [1 − time_fraction, 1], the noisiest part of the schedule (matching, nft).
        noise_level: η of the stochastic sampler (sde).
        sde_clip_range: ε of `clipped_policy_loss` for sde.
        nft_beta: β of `nft_loss`.
    """

    estimator: str
    clip_range: float
    num_pairs: int
    time_fraction: float
    noise_level: float
    sde_clip_range: float
    nft_beta: float


@dataclass(frozen=True)
class PolicyOutput:
    """Output of a policy on B samples.

    Attributes:
        terms: arrays that `policy_loss` compares with the same arrays of the old policy.
            matching: log_prob ℓ [B], and routing [B], the log-probability of the sampled expert.
            sde: log_prob, routing, and mean μ_θ [R, N, 4C].
            nft: velocity v_θ [R, N, 4C].
        velocity: v_θ [R, N, 4C].
        cache: the points at which the policy was evaluated.
        std: standard deviation of each noisy step [R]; None unless the estimator is sde.
    """

    terms: OldPolicy
    velocity: jax.Array
    cache: MatchingCache | TransitionCache
    std: jax.Array | None = None


def policy_cache(
    sample: Sample, keys: jax.Array, region: jax.Array, settings: PolicySettings
) -> MatchingCache | TransitionCache:
    """Return the points at which the current and the old policy are compared on these samples.

    Args:
        sample: B samples. sde reads their trajectory, matching and nft their clean latents.
        keys: [B], equal within a group. The pairs (t, ε) are drawn from them (matching, nft).
        region: weights of mean_Ω [B, N, 4].
        settings: the estimator and its parameters.
    """
    if settings.estimator == "sde":
        return TransitionCache(sample.states, sample.times, region, settings.noise_level)
    return matching_cache(keys, sample.clean, region, count=settings.num_pairs, fraction=settings.time_fraction)


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
        cache: from `policy_cache`.
        settings: the estimator and its parameters.
        temperature: τ of matching.
        routing_log_prob: log w_e [B] of the expert that was drawn for each sample. It is part of the sample's
            log-probability and adds to the log-ratio. None (counts as 0) without `sample` routing.
    """
    routing = jnp.zeros(cache.region.shape[:1]) if routing_log_prob is None else routing_log_prob
    if settings.estimator == "sde":
        log_prob, mean, std, predicted = sde_log_prob(velocity, params, cache)
        return PolicyOutput({"log_prob": log_prob, "mean": mean, "routing": routing}, predicted, cache, std)
    log_prob, predicted = matching_log_prob(velocity, params, cache, temperature=temperature)
    terms = {"velocity": predicted} if settings.estimator == "nft" else {"log_prob": log_prob, "routing": routing}
    return PolicyOutput(terms, predicted, cache)


def policy_loss(
    output: PolicyOutput, old: OldPolicy, advantages: jax.Array, settings: PolicySettings, *, mean: Mean = jnp.mean
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the policy loss of B samples (a scalar) and its metrics.

        matching  `clipped_policy_loss` of the log-ratio ℓ_θ − ℓ_old
        sde       `clipped_policy_loss` of the normalized log-ratio (`normalized_log_ratio`)
        nft       `nft_loss`; the metric policy_change is the mean of mean_Ω ‖v_θ − v_old‖²

    matching and sde add the log-ratio of the sampled experts, log w_e − log w_e,old.

    Args:
        output: the current policy's output on the samples.
        old: the old policy's terms on the same samples; no gradient flows into them.
        advantages: A [B].
        settings: the estimator and its parameters.
        mean: mean over the global batch.
    """
    old, terms = jax.lax.stop_gradient(old), output.terms
    region = output.cache.region
    if settings.estimator == "nft":
        return _nft_policy_loss(output, old["velocity"], advantages, settings, mean)
    # The subtraction comes first. Equal terms then give exactly 0, however the compiler reorders the later operations.
    log_ratio, clip_range = terms["log_prob"] - old["log_prob"], settings.clip_range
    if settings.estimator == "sde":
        log_ratio = normalized_log_ratio(log_ratio, terms["mean"], old["mean"], output.std, region)
        clip_range = settings.sde_clip_range
    log_ratio = log_ratio + (terms["routing"] - old["routing"])
    return clipped_policy_loss(log_ratio, advantages, clip_range=clip_range, mean=mean)


def _nft_policy_loss(
    output: PolicyOutput, old_velocity: jax.Array, advantages: jax.Array, settings: PolicySettings, mean: Mean
) -> tuple[jax.Array, dict[str, jax.Array]]:
    cache, num_points = output.cache, output.cache.num_points
    region = repeat_rows(cache.region, num_points)
    target = velocity_target(repeat_rows(cache.clean, num_points), cache.flat_noise())
    row_optimality = repeat_rows(optimality(advantages), num_points)
    losses = nft_loss(output.velocity, old_velocity, target, region, row_optimality, beta=settings.nft_beta)
    change = jax.lax.stop_gradient(region_mean((output.velocity - old_velocity) ** 2, region))

    def mean_over_samples(values: jax.Array) -> jax.Array:
        return mean(values.reshape(-1, num_points).mean(1))

    return mean_over_samples(losses), {"policy_change": mean_over_samples(change)}


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
