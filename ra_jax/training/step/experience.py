"""What a step learns from: conditions and results as latents, and for each condition the results that are compared.

A condition's results are its *members*: in human mode the record's own result (the rest of the scene stands beside it
in the batch), in automatic mode `num_generations` rollouts of the current weights.
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
from ra_jax.training.step.encode import Context, Encoded, encode
from ra_jax.training.step.generation import generate_samples
from ra_jax.training.step.objective import Metrics, Objective
from ra_jax.training.step.settings import RolloutSettings, StepSettings
from ra_jax.training.step.state import TrainState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience:
    """A microbatch to learn from. Without a policy or rewards what belongs to them is None.

    features: what the router sees [B, F], None without a router; batch: the microbatch, None until
    `collect_experience` adds it;
    samples: [G, B, ...]; advantages: [G, B]; old: the old policy's values of each
    sample [G, ...]; rewards_finite: whether all
    rewards of the step are finite, a scalar; where not, advantages are 0 and members blank. But for `sound` all have
    microbatches as their first axis once `collect_experience` returns them.
    """

    encoded: Encoded
    features: jax.Array | None
    batch: Batch | None = None
    samples: Sample | None = None
    advantages: jax.Array | None = None
    old: OldPolicy | None = None
    rewards_finite: jax.Array | None = None


def collect_experience(
    objective: Objective,
    settings: StepSettings,
    state: TrainState,
    frozen: Weights,
    microbatches: Batch,
    sync: jax.Array,
) -> tuple[Experience, Metrics]:
    """The experience of a step's microbatches [A, B, ...], and the metrics of rewards and drift.

    renewed: the old policy *is* the current weights, so that its passes are skipped (ρ is 1 by construction).
    """
    rollouts, policy = settings.rollouts, objective.settings.policy

    def microbatch(batch: Batch):
        encoded = encode(objective.model, frozen, batch, objective.settings.loss_region)
        context = Context(frozen, batch, encoded, state.seed, state.temperature)
        experience, scores = Experience(encoded, objective.features(encoded)), None
        if rollouts is not None:
            samples, scores = generate_samples(objective, rollouts, state, context)
            experience = replace(experience, samples=samples)
        elif policy is not None:
            samples, advantages = Sample(encoded.clean[None]), batch["advantage"][None]
            experience = replace(experience, samples=samples, advantages=advantages)
        if policy is not None:
            experience = replace(
                experience, old=evaluate_old_policy(objective, state, context, experience.samples, sync)
            )
        drift = drift_metrics(objective, state, context, experience.samples, settings.drift_interval)
        return experience, scores, drift

    experience, scores, measured = jax.lax.map(microbatch, microbatches)
    experience, measured = replace(experience, batch=microbatches), jax.tree.map(jnp.mean, measured)
    if rollouts is None:
        return experience, measured | human_reward_metrics(objective, microbatches)
    experience, rewards = add_rewards(objective, experience, scores, rollouts)
    if policy is None:  # rewards were only to be looked at
        experience = replace(experience, samples=None, advantages=None)
    return experience, measured | rewards


def evaluate_old_policy(objective: Objective, state: TrainState, context: Context, samples: Sample, sync) -> OldPolicy:
    """What the old policy makes of every member [G, ...]; blank where it is the current weights anyway."""

    def evaluate(weights) -> OldPolicy:
        def next_sample(_, sample: Sample):
            return None, objective.evaluate_policy(weights, context, sample).values

        return jax.lax.scan(next_sample, None, samples)[1]

    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(evaluate, state.trainable))
    if state.old_params is None:
        return blank
    return jax.lax.cond(sync, lambda: blank, lambda: evaluate(state.old_params))


def add_rewards(
    objective: Objective, experience: Experience, scores: jax.Array, settings: RolloutSettings
) -> tuple[Experience, Metrics]:
    """The experience with advantages from the rollouts' scores [A, G, B, S], and the rewards' metrics.

    Where a score of the step is not finite the whole step has no policy term (`reward_fallbacks`), and no reward; the
    mean scores tell which it was.
    """
    weights = settings.reward_weights
    rewards_finite = objective.sum((~jnp.isfinite(scores)).sum()) == 0
    raw = objective.mean(scores.reshape(-1, scores.shape[-1]))
    scores = jnp.where(rewards_finite, scores, 0.5)
    advantages_of = partial(group_advantages, weights=weights, drop_negative=settings.drop_negative)
    advantages, spread = jax.vmap(advantages_of)(scores)
    # Pictures that have no reward may not be finite either, and the base loss's gradient has to be.
    blank = jax.tree.map(
        lambda x: jnp.where(rewards_finite, x, 0) if jnp.issubdtype(x.dtype, jnp.inexact) else x, experience.samples
    )
    samples = replace(blank, times=experience.samples.times)
    metrics = {
        "mean_reward": total_reward(raw, weights),
        "reward_std": objective.mean(spread.reshape(-1)),
        "frac_reward_zero_std": objective.mean((spread < MIN_GROUP_STD).reshape(-1)),
    }
    metrics = jax.tree.map(lambda x: jnp.where(rewards_finite, x, jnp.nan), metrics) | {
        "reward_fallbacks": 1.0 - rewards_finite
    }
    metrics |= {f"{reward.name}_score": raw[i] for i, reward in enumerate(settings.rewards)}
    return replace(experience, samples=samples, advantages=advantages, rewards_finite=rewards_finite), metrics


def human_reward_metrics(objective: Objective, batch: Batch) -> Metrics:
    """Human mode's metrics: means over the records [A, B] of reward and each score; over distinct scenes: within-group
    std, share of dead groups."""
    if "reward" not in batch:
        return {}
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    removal, background, smoothness = objective.mean(batch["scores"])
    scenes = batch["condition_weight"]
    return {
        "mean_reward": objective.mean(batch["reward"]),
        "reward_std": objective.mean(batch["group_reward_std"], scenes),
        "frac_reward_zero_std": objective.mean(batch["zero_std_group"], scenes),
        "removal_score": removal,
        "background_score": background,
        "smoothness_score": smoothness,
    }


def drift_metrics(
    objective: Objective, state: TrainState, context: Context, samples: Sample | None, interval: int
) -> Metrics:
    """`Objective.drift` at the last step of every `interval` steps; NaN (not measured) at the others.

    Over the microbatch's results, or where there are none over the first rollout of each condition.
    """
    clean = context.encoded.clean
    if clean is None and samples is not None:
        clean = samples.clean[0]
    if not interval or objective.model.router is None or clean is None:
        return {}

    def measure():
        return objective.drift(state.trainable, context, clean, state.step)

    unmeasured = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(measure))
    return jax.lax.cond((state.step + 1) % interval == 0, measure, lambda: unmeasured)
