"""Strength of the policy: how far the estimator `contrast` moves the model from its reference.

At the fixed point of base loss, policy loss and KL loss the velocity is a weighted mean, and a score s_j that is linear
in the image has moved by

    Δ_j = [ w_base·Cov(w, s_j) + κ·Cov(A, s_j) ] / ( w_base + κ·b + w_kl )

over the results that the losses see: w are their weights in the base loss, with mean 1, and A their advantages. κ and b
are chosen such that Δ_j = s·Cov(A, s_j) + (s·w_base/κ)·Cov(w, s_j) with the strength s (`policy_weights`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.rl.advantages import group_means

MAX_SHIFT = 5.0  # largest s·std(A) that `choose_strength` chooses, in standard deviations of the results
LEAST_GAP = 0.1  # part of a score's gap that is always left to the policy


@partial(jax.tree_util.register_dataclass, data_fields=["strength", "pull", "anchor"], meta_fields=[])
@dataclass(frozen=True)
class PolicyStrength:
    """The weights of `losses.contrast_policy_loss`, float32 scalars.

    Attributes:
        strength: s.
        pull: κ, the weight of the policy loss.
        anchor: b, the weight of the distance from the reference, in units of κ.
    """

    strength: jax.Array
    pull: jax.Array
    anchor: jax.Array


@dataclass(frozen=True)
class LossWeights:
    """Weights of a run's losses.

    Attributes:
        base: w_base; 0 if the records have no results.
        policy: w_policy.
        kl: w_kl.
    """

    base: float
    policy: float
    kl: float


def policy_weights(strength: float, weights: LossWeights) -> PolicyStrength:
    """Compute κ and b for a strength s.

        κ = 4·s·w·(w_policy/0.1)        b = 1/s − (w_base + w_kl)/κ        w = w_base, or 1 if w_base = 0

    Base loss, anchor and KL loss hold the policy at the reference with the weight w_base + κ·b + w_kl = κ/s. The policy
    term pulls with the weight κ. Their quotient is s whatever w_policy is: s sets where the policy comes to rest.
    w_policy sets how much of the hold is the anchor's, three quarters at the weights 1 and 0.1.
    """
    pull = 4.0 * strength * (weights.base or 1.0) * weights.policy / 0.1
    anchor = 1.0 / strength - (weights.base + weights.kl) / pull
    return PolicyStrength(*(jnp.asarray(x, jnp.float32) for x in (strength, pull, anchor)))


@dataclass(frozen=True)
class StrengthTable:
    """Predicted movements of S scores.

    Attributes:
        names: names of the scores.
        means: mean score before training [S].
        advantage_covariances: Cov(A, s_j) [S].
        weight_covariances: Cov(w, s_j) [S].
        base_share: s·w_base/κ, which does not depend on s.
        max_strength: the strength at which s·std(A) is `MAX_SHIFT`.
    """

    names: tuple[str, ...]
    means: np.ndarray
    advantage_covariances: np.ndarray
    weight_covariances: np.ndarray
    base_share: float
    max_strength: float

    def movements(self, strength: float) -> np.ndarray:
        """Return the predicted movement Δ_j of each score at strength s, [S]."""
        return strength * self.advantage_covariances + self.base_share * self.weight_covariances

    def lines(self, strength: float) -> list[str]:
        """Return the table as lines of text, with a remark on scores that overshoot 1 or fall."""
        heads = ("score", "mean", "to gain", "covariance", "expected")
        lines = ["{:<28}{:>8}{:>10}{:>13}{:>11}".format(*heads)]
        for name, mean, covariance, movement in zip(
            self.names, self.means, self.advantage_covariances, self.movements(strength), strict=True
        ):
            remark = ""
            if covariance <= 0:
                remark = "  not taught: better results do not score higher here"
            elif mean + movement > 1:
                remark = "  more than there is to gain"
            lines.append(f"{name:<28}{mean:8.3f}{1 - mean:10.3f}{covariance:13.4f}{movement:+11.3f}{remark}")
        return lines


@dataclass(frozen=True)
class ScoreDeviations:
    """Scores of results, as deviations from those of the same scene.

    Attributes:
        rows: numbers of the results [R].
        deviations: [R, S].
    """

    rows: np.ndarray
    deviations: np.ndarray


def within_scenes(scores: np.ndarray, scenes: np.ndarray) -> ScoreDeviations:
    """Compute the deviations of scores [R, S] from the mean of their scene.

    A model can move only what differs between results of the same condition. Scenes with one result are therefore left
    out, unless all scenes have one: then the deviations are from the mean of all results.
    """
    counts = np.bincount(scenes)[scenes]
    if (counts == 1).all():
        return ScoreDeviations(np.arange(len(scores)), scores - scores.mean(0))
    rows = np.flatnonzero(counts > 1)
    return ScoreDeviations(rows, (scores - group_means(scores, scenes))[rows])


def strength_table(
    names: Sequence[str],
    means: np.ndarray,
    compared: ScoreDeviations,
    advantages: np.ndarray,
    sample_weights: np.ndarray,
    weights: LossWeights,
) -> StrengthTable:
    """Measure what `choose_strength` needs.

    Args:
        names: names of the S scores.
        means: mean of each score [S].
        compared: the results that tell how far scores move, and their deviations.
        advantages: A [R] of all results.
        sample_weights: weights of all results in the base loss [R], with mean 1.
        weights: weights of the losses.
    """
    advantages, sample_weights = (np.asarray(x, np.float64) for x in (advantages, sample_weights))
    std = advantages.std()  # of all results: the policy loss pulls by the advantages of all
    centered = np.asarray(compared.deviations, np.float64)
    return StrengthTable(
        names=tuple(names),
        means=np.asarray(means, np.float64),
        advantage_covariances=advantages[compared.rows] @ centered / len(centered),
        weight_covariances=sample_weights[compared.rows] @ centered / len(centered),
        base_share=weights.base * 0.1 / (4.0 * (weights.base or 1.0) * weights.policy),
        max_strength=MAX_SHIFT / std if std else 0.0,
    )


def choose_strength(table: StrengthTable, reward_weights: np.ndarray) -> float:
    """Choose the strength at which the reward is predicted to gain all that there is to gain.

        s = Σ_j w_j·gap_j / Σ_j w_j·Cov(A, s_j)        over the scores with Cov(A, s_j) > 0
        gap_j = max( 1 − mean s_j − (s·w_base/κ)·Cov(w, s_j), (1 − mean s_j)/10 )

    gap_j is what is left to gain after what the base loss brings by its own weights. s is at most MAX_SHIFT/std(A): the
    prediction extrapolates the results linearly, which holds for some standard deviations only.

    Args:
        table: from `strength_table`.
        reward_weights: weights w of the scores in the total reward [S].

    Raises:
        ValueError: there is nothing to learn, because no score has a positive covariance, a positive weight and a mean
            below 1; or the mean of a score with a weight is not in [0, 1].
    """
    for name, mean, weight in zip(table.names, table.means, reward_weights, strict=True):
        if weight > 0 and not 0.0 <= mean <= 1.0:
            raise ValueError(f"the mean of {name} is {mean:g}: expected scores between 0 and 1")
    taught = (table.advantage_covariances > 0) & (np.asarray(reward_weights) > 0) & (table.means < 1.0)
    if not taught.any():
        raise ValueError("no score is higher in the better results of a scene, so that the policy has nothing to learn")
    room = 1.0 - table.means
    gaps = np.maximum(room - table.base_share * table.weight_covariances, LEAST_GAP * room)
    weights = np.asarray(reward_weights)[taught]
    strength = (weights * gaps[taught]).sum() / (weights * table.advantage_covariances[taught]).sum()
    return float(min(strength, table.max_strength))


def share_pushed_away(
    advantages: np.ndarray,
    sample_weights: np.ndarray,
    base_density: np.ndarray,
    policy_density: np.ndarray,
    *,
    base_weight: float,
    policy_weight: float,
) -> float:
    """Compute for which share of (record, time) pairs the estimator `matching` has no fixed point.

    At ρ = 1 the total loss of record i at time t is c_i(t)·‖v_θ − v*‖² with

        c_i(t) = w_base·w_i·p_base(t) + (w_policy/τ)·A_i·p_policy(t)

    Where c_i(t) < 0, the velocity is pushed away from the record without end. The clip only limits how fast.

    Args:
        advantages: A [R].
        sample_weights: w [R], with mean 1.
        base_density: p_base [T], the density of the base loss's times.
        policy_density: p_policy [T] at the same times.
        base_weight: w_base.
        policy_weight: w_policy/τ.
    """
    pull = policy_weight * np.asarray(advantages)[:, None] * policy_density
    return float((base_weight * np.asarray(sample_weights)[:, None] * base_density + pull < 0).mean())
