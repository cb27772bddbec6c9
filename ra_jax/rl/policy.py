"""Policy loss per estimator: the log-probability of a sample under the policy, and the loss against the old policy.

`evaluate_policy` computes what the loss needs of a policy θ on a sample. `policy_loss` compares the values of the
current policy with those of the old one. Both policies run the same graph, so equal parameters give equal values.
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
    repeat,
    sde_log_prob,
)
from ra_jax.rl.losses import Mean, clipped_policy_loss, nft_loss, optimality
from ra_jax.rl.rollouts import Sample

OldPolicy = dict[str, jax.Array]  # `PolicyOutput.values` under the old policy's parameters


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """How the policy is estimated.

    estimator: "matching", "sde" or "nft"; clip_range: ε of matching; sde_clip_range: ε of sde; pairs: K, the number of
    pairs (t, ε) (matching, nft); fraction: the share of the schedule, from its noisy end, that t is drawn from;
    noise_level: η of sde; nft_beta: β of nft.
    """

    estimator: str
    clip_range: float
    pairs: int
    fraction: float
    noise_level: float
    sde_clip_range: float
    nft_beta: float


@dataclass(frozen=True)
class PolicyOutput:
    """A policy's output on a batch of B samples.

    values: the arrays [B, ...] that `policy_loss` compares with the old policy's: log_prob and routing (matching),
    these and mean (sde), or velocity (nft); velocity: [R, N, 4C] at all R = B·K points, K per sample, side by side;
    cache: the points; std: [R], standard deviation of each sampler step (sde only).
    """

    values: OldPolicy
    velocity: jax.Array
    cache: MatchingCache | TransitionCache
    std: jax.Array | None = None


def policy_cache(
    sample: Sample, keys: jax.Array, region: jax.Array, settings: PolicySettings
) -> MatchingCache | TransitionCache:
    """The points at which the current and the old policy are compared on these samples.

    keys: [B], equal within a group, from which the pairs (t, ε) are drawn; region: mean_Ω's weights [B, N, 4].
    """
    if settings.estimator == "sde":
        return TransitionCache(sample.states, sample.times, region, settings.noise_level)
    return matching_cache(keys, sample.clean, region, count=settings.pairs, fraction=settings.fraction)


def evaluate_policy(
    velocity: PolicyVelocity,
    params: Any,
    cache: MatchingCache | TransitionCache,
    settings: PolicySettings,
    *,
    temperature: jax.Array | float,
    routing_log_prob: jax.Array | None = None,
) -> PolicyOutput:
    """Evaluate the policy `params` on B samples, at the points of `policy_cache`.

    routing_log_prob: log w_e [B] of the sampled experts, which is added to the log-probability.
    """
    routing = jnp.zeros(cache.region.shape[:1]) if routing_log_prob is None else routing_log_prob
    if settings.estimator == "sde":
        log_prob, mean, std, predicted = sde_log_prob(velocity, params, cache)
        return PolicyOutput({"log_prob": log_prob, "mean": mean, "routing": routing}, predicted, cache, std)
    log_prob, predicted = matching_log_prob(velocity, params, cache, temperature=temperature)
    values = {"velocity": predicted} if settings.estimator == "nft" else {"log_prob": log_prob, "routing": routing}
    return PolicyOutput(values, predicted, cache)


def policy_loss(
    output: PolicyOutput, old: OldPolicy, advantages: jax.Array, settings: PolicySettings, *, mean: Mean = jnp.mean
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The policy loss (a scalar) of B samples with advantages [B], and its metrics.

    old: the old policy's values on the same samples; no gradient flows through them. matching and sde take PPO's
    clipped surrogate (`clipped_policy_loss`), sde of a normalized ratio. nft takes `nft_loss`; its metric
    `policy_change` is mean_Ω ‖v_θ − v_old‖².
    """
    old, values = jax.lax.stop_gradient(old), output.values
    region = output.cache.region
    if settings.estimator == "nft":
        return _nft(output, old["velocity"], advantages, settings, mean)
    # Subtract first: equal values then give exactly 0, however the compiler reorders the rest.
    log_ratio, clip_range = values["log_prob"] - old["log_prob"], settings.clip_range
    if settings.estimator == "sde":
        log_ratio = normalized_log_ratio(log_ratio, values["mean"], old["mean"], output.std, region)
        clip_range = settings.sde_clip_range
    log_ratio = log_ratio + (values["routing"] - old["routing"])
    return clipped_policy_loss(log_ratio, advantages, clip_range=clip_range, mean=mean)


def _nft(output: PolicyOutput, old: jax.Array, advantages: jax.Array, settings: PolicySettings, mean: Mean):
    cache, points = output.cache, output.cache.points
    region = repeat(cache.region, points)
    target = velocity_target(repeat(cache.clean, points), cache.flat_noise())
    optimal = repeat(optimality(advantages), points)
    losses = nft_loss(output.velocity, old, target, region, optimal, beta=settings.nft_beta)
    change = jax.lax.stop_gradient(region_mean((output.velocity - old) ** 2, region))

    def per_sample_mean(values: jax.Array) -> jax.Array:
        return mean(values.reshape(-1, points).mean(1))

    return per_sample_mean(losses), {"policy_change": per_sample_mean(change)}


def velocity_distance(
    velocity: jax.Array, reference: jax.Array, region: jax.Array, mean: Callable = jnp.mean
) -> jax.Array:
    """mean over points of mean_Ω ‖v − v_ref‖²: velocities [R, N, 4C] at R/B points per record; region [B, N, 4]."""
    square = (velocity - jax.lax.stop_gradient(reference)) ** 2
    return mean(region_mean(square, repeat(region, len(velocity) // len(region))))
