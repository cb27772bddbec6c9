"""Advantages of scored records and of rollouts, and the weights of records in the base loss.

`human_advantages` and `sample_weights` run once over the whole data set, in NumPy, before training. Their groups are
scenes: all records with the same source and mask.

`group_advantages` is part of the compiled step. Its groups are the rollouts of one condition.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.rewards.registry import total_reward

STD_FLOOR = 0.02  # smallest divisor of a centered score
ADVANTAGE_LIMIT = 5.0  # bound on the advantage of one score, before weighting
MIN_GROUP_STD = 1e-3  # a group whose total rewards have a smaller std gets advantage 0

BASE_LOSS_WEIGHTINGS = ("none", "score", "softmax", "best")


def _group_sums(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    sums = np.zeros((groups.max() + 1, *values.shape[1:]))
    np.add.at(sums, groups, values)
    return sums


def group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the mean of each record's group: values [R, ...] and group numbers [R] in 0…M−1 -> [R, ...]."""
    counts = np.bincount(groups).reshape(-1, *[1] * (values.ndim - 1))
    return (_group_sums(values, groups) / counts)[groups]


def zero_std_groups(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Find the records whose group gives no learning signal, because all total rewards of the group are equal.

    Takes total rewards [R] and group numbers [R]. Returns [R] bool: True if the record's group has at least two records
    and the std of the group's rewards is below 1e-3.
    """
    variance = group_means((rewards - group_means(rewards, groups)) ** 2, groups)
    return (np.sqrt(variance) < MIN_GROUP_STD) & (np.bincount(groups)[groups] > 1)


def human_advantages(scores: np.ndarray, groups: np.ndarray, weights) -> np.ndarray:
    """Compute the advantage of each record of a scored data set (GRPO, Shao et al. 2402.03300, applied per score).

        A = Σ_i w_i · clip((s_i − mean_group s_i) / max(σ_i, 0.02), ±5)
        σ_i² = Σ (s_i − mean_group s_i)² / (R − M), the sum over all R records of the M groups

    σ_i is the *pooled within-group* standard deviation over the data set. R − M is the number of degrees of freedom
    that remain after subtracting the group means. The standard deviation of a single group is not used, because two to
    four records estimate it too poorly.

    A record that is alone in its group is centered on the mean of the data set. If all groups have one record, σ_i is
    the standard deviation over the data set. Groups whose total rewards do not vary (`zero_std_groups`) get A = 0.

    Args:
        scores: s, [R, 3] in [0, 1].
        groups: scene number of each record, [R] in 0…M−1.
        weights: w, [3].

    Returns:
        A, [R] float32.
    """
    scores = np.asarray(scores, np.float64)
    alone = np.bincount(groups)[groups] == 1
    residuals = scores - group_means(scores, groups)
    degrees_of_freedom = len(groups) - len(np.unique(groups))
    pooled_std = np.sqrt((residuals**2).sum(0) / degrees_of_freedom) if degrees_of_freedom else scores.std(0)
    centered = np.where(alone[:, None], scores - scores.mean(0), residuals)
    standardized = np.clip(centered / np.maximum(pooled_std, STD_FLOOR), -ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)
    advantages = standardized @ np.asarray(weights, np.float64)
    return np.where(zero_std_groups(total_reward(scores, weights), groups), 0.0, advantages).astype(np.float32)


def group_advantages(
    scores: jax.Array, weights: jax.Array, *, drop_negative: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Compute the advantages of a step's rollouts (GRPO, Shao et al. 2402.03300, applied per score).

        A = Σ_i w_i · clip((s_i − mean_group s_i) / max(std_group s_i, 0.02), ±5)

    mean_group and std_group are over the G rollouts of one condition.

    With `drop_negative` the advantage is max(A, 0), so that the policy learns only from the better rollouts
    (reward-weighted regression, Peters & Schaal 2007; AWR, Peng et al. 1910.00177). A loss that pulls the policy
    towards an image has a minimum, but a loss that pushes the policy away from an image has none.

    Args:
        scores: s, [G, C, S] in [0, 1]: S scores of G rollouts for each of C conditions.
        weights: w, [S].
        drop_negative: replace negative advantages by 0.

    Returns:
        A [G, C] float32. A is 0 in groups whose total rewards have a std below 1e-3.
        The std [C] of the total rewards of each group.
    """
    centered = scores - scores.mean(0)
    standardized = jnp.clip(centered / jnp.maximum(scores.std(0), STD_FLOOR), -ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)
    reward_std = total_reward(scores, weights).std(0)
    advantages = standardized @ jnp.asarray(weights, jnp.float32)
    if drop_negative:
        advantages = jnp.maximum(advantages, 0.0)
    return jnp.where(reward_std < MIN_GROUP_STD, 0.0, advantages), reward_std


def sample_weights(
    rewards: np.ndarray, groups: np.ndarray, kind: str, *, limit: float = 1.0, temperature: float = 0.05
) -> np.ndarray:
    """Compute the weight of each record in the base loss, scaled to mean 1 over the data set.

    The weight of a record with total reward r, before scaling:

        none      1
        score     (r/limit + 1)/2, which maps [−limit, limit] to [0, 1]
        softmax   exp(r/temperature), normalized to sum 1 in each group
        best      1 for the best record of each group (the first of equally good records), 0 for the others

    Args:
        rewards: total rewards r, [R].
        groups: scene number of each record, [R] in 0…M−1.
        kind: one of `BASE_LOSS_WEIGHTINGS`.
        limit: largest possible |r|, the sum of the score weights; used by "score".
        temperature: number above 0; used by "softmax".

    Returns:
        [R] float32.

    Raises:
        ValueError: `kind` is unknown, or every record has weight 0.
    """
    rewards = np.asarray(rewards, np.float64)
    if kind == "none":
        weights = np.ones_like(rewards)
    elif kind == "score":
        weights = (rewards / limit + 1.0) / 2.0
    elif kind == "softmax":
        group_max = np.full(groups.max() + 1, -np.inf)
        np.maximum.at(group_max, groups, rewards)
        exponentials = np.exp((rewards - group_max[groups]) / temperature)
        weights = exponentials / _group_sums(exponentials, groups)[groups]
    elif kind == "best":
        best_first = np.lexsort((np.arange(len(rewards)), -rewards))
        _, positions = np.unique(groups[best_first], return_index=True)
        weights = np.zeros_like(rewards)
        weights[best_first[positions]] = 1.0
    else:
        raise ValueError(f"base_loss_weighting={kind!r}: expected one of {', '.join(BASE_LOSS_WEIGHTINGS)}")
    if not weights.any():
        raise ValueError(
            f"base_loss_weighting={kind!r} gives every record weight 0, because all rewards are at their minimum: "
            "check the scores, or use --base_loss_weighting none"
        )
    return (weights / weights.mean()).astype(np.float32)
