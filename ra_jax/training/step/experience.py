"""Experience of a step: encoded conditions, samples to learn from, advantages, and terms of the old policy.

In human mode each condition has one sample, the record's result. The results of a scene are in adjacent records of the
batch. In automatic mode each condition has `num_generations` samples, the rollouts of the current weights.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from ra_jax.data.batch import Batch
from ra_jax.models.fill_model import Weights
from ra_jax.rewards.registry import total_reward
from ra_jax.rl.advantages import MIN_GROUP_STD, group_advantages
from ra_jax.rl.policy import OldPolicy
from ra_jax.rl.rollouts import Sample
from ra_jax.training.step.encode import EncodedBatch, LossContext, encode
from ra_jax.training.step.generation import generate_samples
from ra_jax.training.step.objective import Metrics, Objective
from ra_jax.training.step.settings import RolloutSettings, StepSettings
from ra_jax.training.step.state import TrainState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience:
    """The data that a step learns from: a microbatch of B records, with G samples of each condition.

    `collect_experience` returns the experience of all A microbatches. Every field except `rewards_finite` then has a
    leading axis [A].

    Attributes:
        encoded: the microbatch, encoded.
        features: the router's input [B, F]; None without a router.
        batch: the microbatch; None until `collect_experience` adds it.
        samples: [G, B, ...]; None if there is no policy term.
        advantages: A [G, B]; None if there is no policy term.
        old_terms: terms of the old policy for each sample, [G, ...]; None if there is no policy term.
        reference: `Objective.reference_velocity` of each sample, [G, R, N, 4C]; None if the loss does not depend on it.
        rewards_finite: whether all rewards of the step are finite, a bool scalar. If not, all advantages and all
            latents of samples are 0. None without rollouts.
    """

    encoded: EncodedBatch
    features: jax.Array | None
    batch: Batch | None = None
    samples: Sample | None = None
    advantages: jax.Array | None = None
    old_terms: OldPolicy | None = None
    reference: jax.Array | None = None
    rewards_finite: jax.Array | None = None


def collect_experience(
    objective: Objective,
    settings: StepSettings,
    state: TrainState,
    frozen: Weights,
    microbatches: Batch,
    sync: jax.Array,
) -> tuple[Experience, Metrics]:
    """Encode a step's microbatches, collect the samples of every condition, and compute rewards and advantages.

    Args:
        objective: the loss.
        settings: the step's settings.
        state: the train state at the start of the step.
        frozen: the frozen weights.
        microbatches: [A, B, ...].
        sync: bool scalar, whether the old policy equals the current weights. If so, the forward passes of the old
            policy are skipped, because ρ is 1 by construction.

    Returns:
        The experience of all microbatches, and the metrics of rewards and drift.
    """
    rollouts, policy = settings.rollouts, objective.settings.policy

    def collect_microbatch(batch: Batch):
        encoded = encode(objective.model, frozen, batch, objective.settings.loss_region)
        context = LossContext(frozen, batch, encoded, state.seed, state.temperature, state.strength)
        experience, scores = Experience(encoded, objective.router_features(encoded)), None
        if rollouts is not None:
            samples, scores = generate_samples(objective, rollouts, state, context)
            experience = replace(experience, samples=samples)
        elif policy is not None:
            samples, advantages = Sample(encoded.clean[None]), batch["advantage"][None]
            experience = replace(experience, samples=samples, advantages=advantages)
        if policy is not None:
            reference = evaluate_reference(objective, state, context, experience.samples)
            old_terms = evaluate_old_policy(objective, state, context, experience.samples, reference, sync)
            experience = replace(experience, reference=reference, old_terms=old_terms)
        drift = drift_metrics(objective, state, context, experience.samples, settings.drift_interval)
        return experience, scores, drift

    experience, scores, drift = jax.lax.map(collect_microbatch, microbatches)
    experience, drift = replace(experience, batch=microbatches), jax.tree.map(jnp.mean, drift)
    if rollouts is None:
        return experience, drift | human_reward_metrics(objective, microbatches)
    experience, reward_metrics = add_rewards(objective, experience, scores, rollouts)
    if policy is None:  # the rewards are reported as metrics only
        experience = replace(experience, samples=None, advantages=None)
    return experience, drift | reward_metrics


def evaluate_reference(
    objective: Objective, state: TrainState, context: LossContext, samples: Sample
) -> jax.Array | None:
    """Compute `Objective.reference_velocity` of every sample, [G, R, N, 4C]; None if the loss does not depend on it."""
    if not objective.settings.uses_reference:
        return None

    def evaluate_sample(_, sample: Sample):
        return None, objective.reference_velocity(state.trainable, context, sample)

    return jax.lax.scan(evaluate_sample, None, samples)[1]


def evaluate_old_policy(
    objective: Objective,
    state: TrainState,
    context: LossContext,
    samples: Sample,
    reference: jax.Array | None,
    sync: jax.Array,
) -> OldPolicy:
    """Compute the terms of the old policy for every sample, [G, ...].

    If `sync` is true or the state has no separate old policy, the old policy equals the current weights. The terms are
    then zeros, and `Objective.policy_loss` uses the terms of the current policy instead.
    """

    def evaluate(weights) -> OldPolicy:
        def evaluate_sample(_, inputs: tuple[Sample, jax.Array | None]):
            sample, reference = inputs
            return None, objective.evaluate_policy(weights, context, sample, reference).terms

        return jax.lax.scan(evaluate_sample, None, (samples, reference))[1]

    zero_terms = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(evaluate, state.trainable))
    if state.old_params is None:
        return zero_terms
    return jax.lax.cond(sync, lambda: zero_terms, lambda: evaluate(state.old_params))


def add_rewards(
    objective: Objective, experience: Experience, scores: jax.Array, settings: RolloutSettings
) -> tuple[Experience, Metrics]:
    """Compute the advantages from the rollouts' scores [A, G, B, S], and add them to the experience.

    If any score of the step is not finite, the whole step has no policy term. The metric reward_fallbacks is then 1,
    and mean_reward and the std metrics are NaN. The mean of each score is always reported. It shows which reward
    failed.

    Returns:
        The experience with the advantages, and the reward metrics.
    """
    weights = settings.reward_weights
    rewards_finite = objective.sum((~jnp.isfinite(scores)).sum()) == 0
    mean_scores = objective.mean(scores.reshape(-1, scores.shape[-1]))
    scores = jnp.where(rewards_finite, scores, 0.5)
    compute_advantages = partial(group_advantages, weights=weights, drop_negative=settings.drop_negative)
    advantages, reward_std = jax.vmap(compute_advantages)(scores)
    # Images without a finite reward may not be finite themselves. They would make the base loss's gradient NaN.
    samples_or_zeros = jax.tree.map(
        lambda x: jnp.where(rewards_finite, x, 0) if jnp.issubdtype(x.dtype, jnp.inexact) else x, experience.samples
    )
    samples = replace(samples_or_zeros, times=experience.samples.times)
    metrics = {
        "mean_reward": total_reward(mean_scores, weights),
        "reward_std": objective.mean(reward_std.reshape(-1)),
        "frac_reward_zero_std": objective.mean((reward_std < MIN_GROUP_STD).reshape(-1)),
    }
    metrics = jax.tree.map(lambda x: jnp.where(rewards_finite, x, jnp.nan), metrics) | {
        "reward_fallbacks": 1.0 - rewards_finite
    }
    metrics |= {f"{reward.name}_score": mean_scores[i] for i, reward in enumerate(settings.rewards)}
    return replace(experience, samples=samples, advantages=advantages, rewards_finite=rewards_finite), metrics


def human_reward_metrics(objective: Objective, batch: Batch) -> Metrics:
    """Compute the reward metrics of human mode from a batch [A, B, ...]; empty without rewards.

    The reward and each score are averaged over records. The std of rewards within a group, and the fraction of groups
    whose rewards are all equal, are averaged over distinct scenes.
    """
    if "reward" not in batch:
        return {}
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    removal, background, smoothness = objective.mean(batch["scores"])
    scene_weights = batch["condition_weight"]
    return {
        "mean_reward": objective.mean(batch["reward"]),
        "reward_std": objective.mean(batch["group_reward_std"], scene_weights),
        "frac_reward_zero_std": objective.mean(batch["zero_std_group"], scene_weights),
        "removal_score": removal,
        "background_score": background,
        "smoothness_score": smoothness,
    }


def drift_metrics(
    objective: Objective, state: TrainState, context: LossContext, samples: Sample | None, interval: int
) -> Metrics:
    """Measure `Objective.drift` at the last of every `interval` steps; NaN (not measured) at the other steps.

    Drift is measured on the results of the microbatch. If the records have no results, it is measured on the first
    rollout of each condition. Returns an empty dict if `interval` is 0, if there is no router, or if there are neither
    results nor rollouts.
    """
    clean = context.encoded.clean
    if clean is None and samples is not None:
        clean = samples.clean[0]
    if not interval or objective.model.router is None or clean is None:
        return {}

    def measure():
        return objective.drift(state.trainable, context, clean, state.step)

    not_measured = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(measure))
    return jax.lax.cond((state.step + 1) % interval == 0, measure, lambda: not_measured)
