"""One training step: a pure function of (state, frozen, batch), compiled as one program.

The policy gradient is computed by this chain of calls: `train_step` → `learn` → `compute_gradients` →
`Objective.policy_loss` → `rl.policy.policy_loss` → `rl.losses.clipped_policy_loss`.

Shapes: A microbatches of B records, G samples of each condition.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ra_jax.data.batch import Batch
from ra_jax.models.fill_model import Weights
from ra_jax.parallel.collectives import mean_gradients
from ra_jax.rl.losses import next_temperature
from ra_jax.training.step.encode import LossContext
from ra_jax.training.step.experience import Experience, collect_experience
from ra_jax.training.step.objective import Metrics, Objective
from ra_jax.training.step.settings import StepSettings
from ra_jax.training.step.state import TrainState

# Metrics that a step reports only for its last update. In the first update the old policy may equal the current policy.
LAST_UPDATE_METRICS = ("mean_ratio", "clip_fraction", "approx_kl", "policy_change", "reference_distance")


@dataclass(frozen=True)
class StepDefinition:
    """The static inputs of a step: loss, optimizer and settings."""

    objective: Objective
    optimizer: optax.GradientTransformation
    settings: StepSettings


def make_train_step(objective: Objective, optimizer: optax.GradientTransformation, settings: StepSettings):
    """Make the function `train_step(state, frozen, batch, *, axis_name=None) -> (state, metrics)`.

    The function is not jitted. When callers jit it, they should donate the state.

    The arrays of the batch are [A, B, ...]. The records of a scene are adjacent, and a scene may continue in the next
    microbatch. Metrics are scalars. A metric is NaN if the step did not measure it. `axis_name` is the name of the
    mapped axis under `jax.pmap`. B is then the number of records of one replica.
    """

    def train_step(state: TrainState, frozen: Weights, batch: Batch, *, axis_name: str | None = None):
        definition = StepDefinition(replace(objective, axis_name=axis_name), optimizer, settings)
        sync = settings.sync_due(state.step)
        state = replace(state, old_params=sync_old_params(state, sync))
        experience, metrics = collect_experience(definition.objective, settings, state, frozen, batch, sync)
        state, update_metrics = learn(definition, state, frozen, experience, on_policy=sync)
        if "clip_fraction" in update_metrics:
            temperature, clip_at_sync = update_temperature(state, update_metrics["clip_fraction"][-1], settings)
            metrics |= {"clip_fraction_at_sync": clip_at_sync, "policy_temperature": state.temperature}
            state = replace(state, temperature=temperature, clip_at_sync=clip_at_sync)
        ema = update_ema(state, state.trainable, settings.ema_decay)
        return replace(state, ema=ema, step=state.step + 1), reduce_metrics(update_metrics) | metrics

    return train_step


def learn(
    definition: StepDefinition, state: TrainState, frozen: Weights, experience: Experience, *, on_policy: jax.Array
) -> tuple[TrainState, Metrics]:
    """Apply the step's updates to weights, optimizer state and the router's running mean.

    Args:
        definition: loss, optimizer and settings.
        state: the train state.
        frozen: the frozen weights.
        experience: of all microbatches, [A, B, ...].
        on_policy: bool scalar, whether the weights equal the old policy before the first update.

    Returns:
        The new state, and the metrics of each update, [updates].
    """
    objective, optimizer, settings = definition.objective, definition.optimizer, definition.settings
    # Every update starts from the running mean at the start of the step, so that the mean moves only once per step.
    router_mean = state.router_mean

    def update(carry: tuple[TrainState, Any], number: jax.Array):
        state, old_terms = carry
        gradients, metrics, old_terms = compute_gradients(
            objective,
            state,
            frozen,
            replace(experience, old_terms=old_terms),
            update=state.step * settings.num_updates + number,
            on_policy=on_policy & (number == 0),
        )
        gradients, new_mean, metrics = add_diversity_gradient(
            objective, replace(state, router_mean=router_mean), experience, gradients, metrics
        )
        gradients = jax.tree.map(lambda g: mean_gradients(g, objective.axis_name), gradients)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return (replace(state, trainable=trainable, opt_state=opt_state, router_mean=new_mean), old_terms), metrics

    (state, _), metrics = jax.lax.scan(update, (state, experience.old_terms), jnp.arange(settings.num_updates))
    return state, metrics


def reduce_metrics(metrics: Metrics) -> Metrics:
    """Reduce metrics [updates] to scalars: the last value for `LAST_UPDATE_METRICS`, the mean for all others."""
    return {name: x[-1] if name in LAST_UPDATE_METRICS else x.mean() for name, x in metrics.items()}


def sync_old_params(state: TrainState, sync: jax.Array) -> Any:
    """Return the current weights if `sync` is true, else `state.old_params`; None without a separate old policy."""
    if state.old_params is None:
        return None
    return jax.tree.map(lambda current, old: jnp.where(sync, current, old), state.trainable, state.old_params)


def compute_gradients(
    objective: Objective,
    state: TrainState,
    frozen: Weights,
    experience: Experience,
    *,
    update: jax.Array,
    on_policy: jax.Array,
) -> tuple[Any, Metrics, Any]:
    """Compute the mean gradient of base and policy loss over microbatches and samples.

    Args:
        objective: the loss.
        state: the train state.
        frozen: the frozen weights.
        experience: of all microbatches, [A, B, ...].
        update: number of the update in the run.
        on_policy: bool scalar, whether the weights equal the old policy.

    Returns:
        The gradient, the metrics, and the terms of the old policy for the next update.
    """

    def add_policy_gradient(total, sample_inputs, context: LossContext):
        loss_and_gradient = jax.value_and_grad(objective.policy_loss, has_aux=True)
        (loss, (metrics, old_terms)), gradient = loss_and_gradient(
            state.trainable, context, *sample_inputs, on_policy=on_policy
        )
        num_samples = experience.advantages.shape[1]
        # where(), not * 0: the gradient of samples without finite rewards may be NaN.
        total = jax.tree.map(lambda t, g: t + jnp.where(rewards_finite, g / num_samples, 0.0), total, gradient)
        metrics = jax.tree.map(lambda x: jnp.where(rewards_finite, x, jnp.nan), metrics)  # NaN: not measured
        return total, (metrics | {"train_loss": jnp.where(rewards_finite, loss, 0.0)}, old_terms)

    def add_microbatch_gradient(total, experience: Experience):
        context = LossContext(
            frozen, experience.batch, experience.encoded, state.seed, state.temperature, state.strength
        )
        metrics, old_terms = {"train_loss": jnp.zeros(())}, None
        if experience.encoded.clean is not None:
            loss_and_gradient = jax.value_and_grad(objective.base_loss, has_aux=True)
            (loss, base_metrics), gradient = loss_and_gradient(state.trainable, context, update)
            total = jax.tree.map(jnp.add, total, gradient)
            metrics = base_metrics | {"train_loss": loss}
        if experience.advantages is not None:
            inputs = (experience.samples, experience.advantages, experience.old_terms, experience.reference)
            total, (policy_metrics, old_terms) = jax.lax.scan(
                lambda total, sample_inputs: add_policy_gradient(total, sample_inputs, context), total, inputs
            )
            policy_metrics = jax.tree.map(lambda x: x.mean(0), policy_metrics)
            train_loss = metrics["train_loss"] + policy_metrics["train_loss"]
            metrics = metrics | policy_metrics | {"train_loss": train_loss}
        return total, (metrics, old_terms)

    rewards_finite = jnp.asarray(True) if experience.rewards_finite is None else experience.rewards_finite
    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    scanned = replace(experience, rewards_finite=None)
    gradients, (metrics, old_terms) = jax.lax.scan(add_microbatch_gradient, zeros, scanned)
    gradients = jax.tree.map(lambda g: g / len(experience.batch["mask"]), gradients)
    return gradients, jax.tree.map(lambda x: x.mean(0), metrics), old_terms


def add_diversity_gradient(
    objective: Objective, state: TrainState, experience: Experience, gradients: Any, metrics: Metrics
) -> tuple[Any, Any, Metrics]:
    """Add the gradient and metrics of the diversity loss over all conditions of the step.

    The loss is not computed per microbatch. A scene that is split between two microbatches would then count twice, and
    the running mean would decay A times per step.

    Returns:
        The gradients, the router's new running mean (None without a router), and the metrics.
    """
    features = experience.features
    if features is None:
        return gradients, None, metrics
    loss_and_gradient = jax.value_and_grad(objective.diversity_loss, has_aux=True)
    (loss, (router_mean, diversity_metrics)), diversity_gradient = loss_and_gradient(
        state.trainable,
        features.reshape(-1, features.shape[-1]),
        experience.batch["condition_weight"].reshape(-1),
        state.router_mean,
    )
    metrics = metrics | diversity_metrics | {"train_loss": metrics["train_loss"] + loss}
    return jax.tree.map(jnp.add, gradients, diversity_gradient), router_mean, metrics


def update_temperature(
    state: TrainState, clip_fraction: jax.Array, settings: StepSettings
) -> tuple[jax.Array, jax.Array]:
    """Return τ and clip_at_sync after this step. Both change only at the last step before a sync of the old policy.

    Neither changes if the clip fraction is NaN (the step had no policy term). τ changes only with `adapt_temperature`.
    """
    due = settings.sync_due(state.step + 1) & ~jnp.isnan(clip_fraction)
    clip_at_sync = jnp.where(due, clip_fraction, state.clip_at_sync)
    if not settings.adapt_temperature:
        return state.temperature, clip_at_sync
    temperature = jnp.where(due, next_temperature(state.temperature, clip_at_sync), state.temperature)
    return temperature, clip_at_sync


def update_ema(state: TrainState, trainable: Any, decay: float) -> Any:
    """Update the exponential moving average of the weights; None without averaging.

    The decay at step n is min(`decay`, (1 + n)/(10 + n)), a warm-up.
    """
    if state.ema is None:
        return None
    decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
    return jax.tree.map(lambda ema, weight: decay * ema + (1.0 - decay) * weight, state.ema, trainable)
