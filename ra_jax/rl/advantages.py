"""Advantages: of human-scored records, with the weights by which they are imitated, and of a step's rollouts.

The first two are computed once over the data set, in NumPy, before training: a group is all the records of one scene.
Rollouts' are a part of the compiled step: a group is the rollouts of one condition.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.rewards.registry import total_reward

STD_FLOOR = 0.02
ADVANTAGE_LIMIT = 5.0
MIN_GROUP_STD = 1e-3

BASE_LOSS_WEIGHTINGS = ("none", "score", "softmax", "best")


def _group_sums(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    sums = np.zeros((groups.max() + 1, *values.shape[1:]))
    np.add.at(sums, groups, values)
    return sums


def group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each record's group mean; values [R, ...], groups [R] in 0…G−1 -> [R, ...]."""
    counts = np.bincount(groups).reshape(-1, *[1] * (values.ndim - 1))
    return (_group_sums(values, groups) / counts)[groups]


def zero_std_groups(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Records [R] of groups of at least two whose total rewards have std < 1e-3: they say nothing."""
    variance = group_means((rewards - group_means(rewards, groups)) ** 2, groups)
    return (np.sqrt(variance) < MIN_GROUP_STD) & (np.bincount(groups)[groups] > 1)


def human_advantages(scores: np.ndarray, groups: np.ndarray, weights) -> np.ndarray:
    """Advantage of every record of a scored data set (GRPO, Shao et al. 2402.03300, per score), [R] float32.

        A = Σ_i w_i · clip((s_i − mean_group s_i) / max(σ_i, 0.02), ±5)

    scores [R, 3] in [0, 1]; groups [R] scene numbers in 0…G−1; weights [3]. σ_i is the *pooled within-group* standard
    deviation over the data set, with the degrees of freedom that the groups' means leave: a group of two or four says
    too little about its own. A scene with a single record is centred on the data set's mean. Groups whose total reward
    does not vary (`zero_std_groups`) get 0.
    """
    scores = np.asarray(scores, np.float64)
    single = np.bincount(groups)[groups] == 1
    residual = scores - group_means(scores, groups)
    freedom = len(groups) - len(np.unique(groups))
    pooled = np.sqrt((residual**2).sum(0) / freedom) if freedom else scores.std(0)
    centered = np.where(single[:, None], scores - scores.mean(0), residual)
    standard = np.clip(centered / np.maximum(pooled, STD_FLOOR), -ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)
    advantages = standard @ np.asarray(weights, np.float64)
    return np.where(zero_std_groups(total_reward(scores, weights), groups), 0.0, advantages).astype(np.float32)


def group_advantages(
    scores: jax.Array, weights: jax.Array, *, drop_negative: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Advantages of a step's rollouts, and the spread of each group's total reward (Shao et al. 2402.03300, per score).

        A = Σ_i w_i · clip((s_i − mean_group s_i) / max(std_group s_i, 0.02), ±5)

    With `drop_negative` max(A, 0), after which only better rollouts are learnt from (reward-weighted regression, Peters
    & Schaal 2007; AWR, Peng et al. 1910.00177): to imitate an image has an end, to get away from one has none.

    scores: [G, C, S] in [0, 1] of G rollouts of C conditions; weights: [S]. Returns A [G, C] float32, 0 in groups whose
    total reward has a std below 1e-3, and that std [C].
    """
    centered = scores - scores.mean(0)
    standard = jnp.clip(centered / jnp.maximum(scores.std(0), STD_FLOOR), -ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)
    spread = total_reward(scores, weights).std(0)
    advantages = standard @ jnp.asarray(weights, jnp.float32)
    if drop_negative:
        advantages = jnp.maximum(advantages, 0.0)
    return jnp.where(spread < MIN_GROUP_STD, 0.0, advantages), spread


def sample_weights(
    rewards: np.ndarray, groups: np.ndarray, kind: str, *, limit: float = 1.0, temperature: float = 0.05
) -> np.ndarray:
    """Weight of each record in the base loss, [R] float32, with mean 1 over the data set.

    none: 1. score: the reward mapped from [−limit, limit] to [0, 1]. softmax: exp(R/temperature), normalised in each
    group. best: the best record of each group only (the first of equals).
    """
    rewards = np.asarray(rewards, np.float64)
    if kind == "none":
        weights = np.ones_like(rewards)
    elif kind == "score":
        weights = (rewards / limit + 1.0) / 2.0
    elif kind == "softmax":
        highest = np.full(groups.max() + 1, -np.inf)
        np.maximum.at(highest, groups, rewards)
        exponent = np.exp((rewards - highest[groups]) / temperature)
        weights = exponent / _group_sums(exponent, groups)[groups]
    elif kind == "best":
        order = np.lexsort((np.arange(len(rewards)), -rewards))
        _, first = np.unique(groups[order], return_index=True)
        weights = np.zeros_like(rewards)
        weights[order[first]] = 1.0
    else:
        raise ValueError(f"base_loss_weighting={kind!r}: expected one of {', '.join(BASE_LOSS_WEIGHTINGS)}")
    if not weights.any():
        raise ValueError(
            f"base_loss_weighting={kind!r} gives every record weight 0, since all rewards are at their minimum: "
            "check the scores, or use --base_loss_weighting none"
        )
    return (weights / weights.mean()).astype(np.float32)
