"""The policy's loss by each estimator: what a policy thinks of a group's member, and how it should come to think.

`judge` says what a policy θ makes of a member, and leaves a `record` of it; `policy_loss` compares that with the old
policy's record. Both are the same graph whoever θ is, so that equal parameters leave equal records.
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
    TransitionCache,
    Velocity,
    matching_cache,
    matching_log_prob,
    normalised_log_ratio,
    repeat,
    sde_log_prob,
)
from ra_jax.rl.losses import Mean, clipped_policy_loss, nft_loss, optimality
from ra_jax.rl.rollouts import Member

Record = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """estimator: matching, sde or nft; clip_range: ε of matching, sde_clip_range: that of sde; pairs, fraction:
    K pairs (t, ε) from the noisiest part of time (matching, nft); noise_level: η of sde; nft_beta: β of nft."""

    estimator: str
    clip_range: float
    pairs: int
    fraction: float
    noise_level: float
    sde_clip_range: float
    nft_beta: float


@dataclass(frozen=True)
class Judgement:
    """record: what is remembered of it, [B, ...] arrays; velocity [R, N, 4C] at the R points judged, R/B a record side
    by side; std [R]: of the sampler's steps (sde)."""

    record: Record
    velocity: jax.Array
    cache: MatchingCache | TransitionCache
    std: jax.Array | None = None


def policy_cache(
    member: Member, keys: jax.Array, region: jax.Array, settings: PolicySettings
) -> MatchingCache | TransitionCache:
    """The points at which policies are compared over a member of each group.

    keys: [B], equal within a group, of the pairs (t, ε); region: mean_Ω's weights [B, N, 4].
    """
    if settings.estimator == "sde":
        return TransitionCache(member.states, member.times, region, settings.noise_level)
    return matching_cache(keys, member.clean, region, count=settings.pairs, fraction=settings.fraction)


def judge(
    velocity: Velocity,
    params: Any,
    cache: MatchingCache | TransitionCache,
    settings: PolicySettings,
    *,
    temperature: jax.Array | float,
    routing_log_prob: jax.Array | None = None,
) -> Judgement:
    """What the policy `params` thinks of a member of each group, at the points of `policy_cache`.

    routing_log_prob: log w_e [B] of the experts that were drawn, which joins the log-probability.
    """
    routing = jnp.zeros(cache.region.shape[:1]) if routing_log_prob is None else routing_log_prob
    if settings.estimator == "sde":
        log_prob, mean, std, predicted = sde_log_prob(velocity, params, cache)
        return Judgement({"log_prob": log_prob, "mean": mean, "routing": routing}, predicted, cache, std)
    log_prob, predicted = matching_log_prob(velocity, params, cache, temperature=temperature)
    record = {"velocity": predicted} if settings.estimator == "nft" else {"log_prob": log_prob, "routing": routing}
    return Judgement(record, predicted, cache)


def policy_loss(
    judgement: Judgement, old: Record, advantages: jax.Array, settings: PolicySettings, *, mean: Mean = jnp.mean
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss (a scalar) of judged members [B] with these advantages [B], and its metrics.

    old: the old policy's record of the same members, through which no gradient flows. matching, sde: PPO's clipped
    surrogate (`clipped_policy_loss`), sde's of a normalised ratio. nft: `nft_loss`, whose metric
    `policy_change` is mean_Ω ‖v_θ − v_old‖².
    """
    old, record = jax.lax.stop_gradient(old), judgement.record
    region = judgement.cache.region
    if settings.estimator == "nft":
        return _nft(judgement, old["velocity"], advantages, settings, mean)
    # Differences first: of equal records they are exactly 0, whatever the compiler makes of the rest.
    log_ratio, clip_range = record["log_prob"] - old["log_prob"], settings.clip_range
    if settings.estimator == "sde":
        log_ratio = normalised_log_ratio(log_ratio, record["mean"], old["mean"], judgement.std, region)
        clip_range = settings.sde_clip_range
    log_ratio = log_ratio + (record["routing"] - old["routing"])
    return clipped_policy_loss(log_ratio, advantages, clip_range=clip_range, mean=mean)


def _nft(judgement: Judgement, old: jax.Array, advantages: jax.Array, settings: PolicySettings, mean: Mean):
    cache, points = judgement.cache, judgement.cache.points
    region = repeat(cache.region, points)
    target = velocity_target(repeat(cache.clean, points), cache.flat_noise())
    optimal = repeat(optimality(advantages), points)
    losses = nft_loss(judgement.velocity, old, target, region, optimal, beta=settings.nft_beta)
    change = jax.lax.stop_gradient(region_mean((judgement.velocity - old) ** 2, region))

    def by_record(values: jax.Array) -> jax.Array:
        return mean(values.reshape(-1, points).mean(1))

    return by_record(losses), {"policy_change": by_record(change)}


def distance(velocity: jax.Array, reference: jax.Array, region: jax.Array, mean: Callable = jnp.mean) -> jax.Array:
    """mean over points of mean_Ω ‖v − v_ref‖²: velocities [R, N, 4C]; region [B, N, 4], R/B points a record."""
    square = (velocity - jax.lax.stop_gradient(reference)) ** 2
    return mean(region_mean(square, repeat(region, len(velocity) // len(region))))
