"""Chooses the strength of the estimator `contrast`, and prints what it is expected to do, before the first step.

In human mode the scores are those of the records. In automatic mode they are those of rollouts of the initial weights,
which are the reference.
"""

import logging
from collections.abc import Sequence
from itertools import islice

import jax
import numpy as np

from ra_jax.config.settings import TrainConfig
from ra_jax.data.loader import Loader
from ra_jax.data.records import scene_ids
from ra_jax.data.scores import SCORE_NAMES
from ra_jax.errors import DataError
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.models.fill_model import Weights
from ra_jax.parallel.partitioner import fetch
from ra_jax.rl.advantages import group_advantages
from ra_jax.rl.strength import (
    LossWeights,
    PolicyStrength,
    ScoreDeviations,
    StrengthTable,
    choose_strength,
    policy_weights,
    share_pushed_away,
    strength_table,
    within_scenes,
)
from ra_jax.training.build import INITIAL_TEMPERATURE
from ra_jax.training.dataset import RunData
from ra_jax.training.step.encode import LossContext, encode
from ra_jax.training.step.generation import generate_samples
from ra_jax.training.step.objective import Objective
from ra_jax.training.step.settings import RolloutSettings
from ra_jax.training.step.state import TrainState

log = logging.getLogger(__name__)

PLACEHOLDER = 1.0  # strength before `auto` has chosen one


def given_strength(config: TrainConfig, weights: LossWeights) -> PolicyStrength | None:
    """Return the weights of the policy loss for --policy_strength; None unless the estimator is contrast.

    Before `auto` has chosen a strength, it is `PLACEHOLDER`.
    """
    if not config.uses_policy or config.grpo.estimator != "contrast":
        return None
    strength = config.grpo.policy_strength
    return policy_weights(PLACEHOLDER if strength == "auto" else strength, weights)


def table_of_scores(config: TrainConfig, data: RunData) -> StrengthTable:
    """Return the predicted movements of human mode."""
    values, weights = data.values, loss_weights(config, has_results=data.has_target)
    scores, advantages, sample_weights = values["scores"], values["advantage"], values["sample_weight"]
    compared = within_scenes(scores, scene_ids(data.records))
    return strength_table(SCORE_NAMES, scores.mean(0), compared, advantages, sample_weights, weights)


def strength_from_scores(config: TrainConfig, data: RunData) -> PolicyStrength:
    """Return the weights of the policy loss of human mode, and print the table of predicted movements."""
    table, weights = table_of_scores(config, data), loss_weights(config, has_results=data.has_target)
    advice = "add scored results, several of each scene and with different scores, or remove --enable_grpo_loss"
    source = config.data.train_json_path
    return _choose(config, table, config.grpo.reward_weights, weights, source=source, advice=advice)


def strength_from_rollouts(
    config: TrainConfig,
    objective: Objective,
    rollouts: RolloutSettings,
    loader: Loader,
    state: TrainState,
    frozen: Weights,
) -> PolicyStrength:
    """Return the weights of the policy loss of automatic mode, measured on rollouts of the initial weights.

    Args:
        config: the run's configuration.
        objective: the run's loss.
        rollouts: the run's rollouts.
        loader: yields conditions, one in a batch.
        state: the initial state, which has the reference as its weights.
        frozen: the frozen weights.
    """

    @jax.jit
    def score(state: TrainState, frozen: Weights, batch):
        encoded = encode(objective.model, frozen, batch, objective.settings.loss_region)
        context = LossContext(frozen, batch, encoded, state.seed, state.temperature, state.strength)
        _, scores = generate_samples(objective, rollouts, state, context)
        return scores, group_advantages(scores, rollouts.reward_weights, drop_negative=rollouts.drop_negative)[0]

    batches = islice(loader.iterate(0), loader.batches_per_epoch)
    measured = [[fetch(x) for x in score(state, frozen, batch | {"file_mask": batch["mask"]})] for batch in batches]
    scores, advantages = (np.concatenate(x, axis=1) for x in zip(*measured, strict=True))
    scores, advantages = scores.reshape(-1, scores.shape[-1]), advantages.reshape(-1)
    finite = np.isfinite(scores).all(-1) & np.isfinite(advantages)
    if not finite.any():
        strength = float(state.strength.strength)
        log.warning("no rollout of the initial weights has rewards that are finite: policy_strength is %g", strength)
        return state.strength
    scores, advantages = scores[finite], advantages[finite]
    weights = loss_weights(config, has_results="result" in next(loader.iterate(0)))
    names = [reward.name for reward in rollouts.rewards]
    compared = ScoreDeviations(np.arange(len(scores)), scores - scores.mean(0))
    table = strength_table(names, scores.mean(0), compared, advantages, np.ones(len(scores)), weights)
    source = f"{len(scores)} rollouts of {loader.batches_per_epoch} scenes"
    advice = (
        "check --reward_functions and their weights, give a number as --policy_strength, or remove --enable_grpo_loss"
    )
    return _choose(config, table, rollouts.reward_weights, weights, source=source, advice=advice)


def warn_of_matching(config: TrainConfig, data: RunData, schedule: FlowSchedule, token_side: int) -> None:
    """Warn at the start of a run of the estimator `matching` that its loss has no minimum for some of the records.

    Args:
        config: the run's configuration.
        data: the run's data.
        schedule: times of the base loss.
        token_side: side of a token in pixels.
    """
    if not config.uses_policy or config.grpo.estimator != "matching" or config.mode != "human":
        return
    fraction, temperature = config.grpo.policy_timestep_fraction, config.grpo.policy_temperature
    tokens = max(2 * height * width for height, width in data.buckets) // token_side**2
    times = 1.0 - fraction * (np.arange(64) + 0.5) / 64
    share = share_pushed_away(
        data.values["advantage"],
        data.values["sample_weight"],
        schedule.training_density(times, tokens),
        np.full(64, 1.0 / fraction),
        base_weight=config.losses.base_loss_weight,
        policy_weight=config.losses.policy_loss_weight
        / (INITIAL_TEMPERATURE if temperature == "auto" else temperature),
    )
    log.warning(
        "policy_estimator matching pushes the model away from %.0f %% of the (result, time) pairs, without a limit: a "
        "long run leaves the data. Watch held_out_reward, or use the estimator contrast, which comes to rest",
        100 * share,
    )


def loss_weights(config: TrainConfig, *, has_results: bool) -> LossWeights:
    """Return the weights of the run's losses; without results there is no base loss."""
    losses = config.losses
    base = losses.base_loss_weight if has_results else 0.0
    if config.mode == "automatic":
        base *= config.rollouts.reward_interval  # the base loss acts in all steps, the policy in those with rewards
    return LossWeights(base=base, policy=losses.policy_loss_weight, kl=config.grpo.kl_weight)


def _choose(
    config: TrainConfig,
    table: StrengthTable,
    reward_weights: Sequence[float],
    weights: LossWeights,
    *,
    source: str,
    advice: str,
) -> PolicyStrength:
    """Return the weights of the policy loss, and print the table.

    Args:
        config: the run's configuration.
        table: predicted movements of the scores.
        reward_weights: weights of the scores in the total reward [S].
        weights: weights of the losses.
        source: where the scores are from, for messages.
        advice: what to do if `auto` finds nothing to learn.

    Raises:
        DataError: `auto` finds nothing to learn.
    """
    strength = config.grpo.policy_strength
    if strength == "auto":
        try:
            strength = choose_strength(table, np.asarray(reward_weights))
        except ValueError as error:
            raise DataError(f"{source}: {error}; {advice}") from None
    chosen = policy_weights(strength, weights)
    log.info(
        "policy_strength = %.3g (pull %.3g, anchor %.3g); scores of %s, and how far they are expected to move:\n  %s",
        strength,
        chosen.pull,
        chosen.anchor,
        source,
        "\n  ".join(table.lines(strength)),
    )
    return chosen
