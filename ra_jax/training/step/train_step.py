"""One training step: a pure function of (state, frozen, batch), compiled as one program.

The way to the policy's gradient: `train_step` → `learn` → `compute_gradients` → `Objective.policy` →
`rl.policy.policy_loss` → `rl.losses.clipped_policy_loss`.
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
from ra_jax.training.step.encode import Context
from ra_jax.training.step.experience import Experience, collect_experience
from ra_jax.training.step.objective import Metrics, Objective
from ra_jax.training.step.settings import StepSettings
from ra_jax.training.step.state import TrainState

# What a step reports of its last update alone: in the first the old policy may be the current one.
LAST_UPDATE_METRICS = ("mean_ratio", "clip_fraction", "approx_kl", "policy_change")


@dataclass(frozen=True)
class StepProgram:
    """The static parts of a step: what is minimized, by which optimizer, and what is done around it."""

    objective: Objective
    optimizer: optax.GradientTransformation
    settings: StepSettings


def make_train_step(objective: Objective, optimizer: optax.GradientTransformation, settings: StepSettings):
    """`train_step(state, frozen, batch, *, axis_name=None) -> (state, metrics)` for `jax.jit` (donate the state).

    The batch's arrays are [A, B, ...] of A microbatches, a scene's records side by side (one may go on in the next);
    metrics are scalars, NaN where a step did not measure one. axis_name: of the replicas under `jax.pmap`, whose B are
    a part of the microbatch.
    """

    def train_step(state: TrainState, frozen: Weights, batch: Batch, *, axis_name: str | None = None):
        program = StepProgram(replace(objective, axis_name=axis_name), optimizer, settings)
        sync = settings.sync_due(state.step)
        state = replace(state, old_params=sync_old_params(state, sync))
        experience, measured = collect_experience(program.objective, settings, state, frozen, batch, sync)
        state, metrics = learn(program, state, frozen, experience, on_policy=sync)
        if "clip_fraction" in metrics:
            temperature, clip_at_sync = update_temperature(state, metrics["clip_fraction"][-1], settings)
            measured |= {"clip_fraction_at_sync": clip_at_sync, "policy_temperature": state.temperature}
            state = replace(state, temperature=temperature, clip_at_sync=clip_at_sync)
        ema = update_ema(state, state.trainable, settings.ema_decay)
        return replace(state, ema=ema, step=state.step + 1), reduce_metrics(metrics) | measured

    return train_step


def learn(
    program: StepProgram, state: TrainState, frozen: Weights, experience: Experience, *, on_policy: jax.Array
) -> tuple[TrainState, Metrics]:
    """The step's updates of weights, optimizer and the router's running mean, and metrics of each [updates].

    experience: of all microbatches [A, B, ...]; fresh: the weights are the old policy's, until the first update.
    """
    objective, optimizer, settings = program.objective, program.optimizer, program.settings
    router_mean = state.router_mean  # it moves once a step, however many updates

    def update(carry: tuple[TrainState, Any], number: jax.Array):
        state, old = carry
        gradients, metrics, old = compute_gradients(
            objective,
            state,
            frozen,
            replace(experience, old=old),
            update=state.step * settings.updates + number,
            on_policy=on_policy & (number == 0),
        )
        gradients, new_mean, metrics = add_diversity_gradient(
            objective, replace(state, router_mean=router_mean), experience, gradients, metrics
        )
        gradients = jax.tree.map(lambda g: mean_gradients(g, objective.axis_name), gradients)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return (replace(state, trainable=trainable, opt_state=opt_state, router_mean=new_mean), old), metrics

    (state, _), metrics = jax.lax.scan(update, (state, experience.old), jnp.arange(settings.updates))
    return state, metrics


def reduce_metrics(metrics: Metrics) -> Metrics:
    """Scalars from the metrics of each update [updates]: the mean, or the last (`LAST_UPDATE_METRICS`)."""
    return {name: x[-1] if name in LAST_UPDATE_METRICS else x.mean() for name, x in metrics.items()}


def sync_old_params(state: TrainState, sync: jax.Array) -> Any:
    """The old policy: the current weights where it is `renewed`, else what it was."""
    if state.old_params is None:
        return None
    return jax.tree.map(lambda new, old: jnp.where(sync, new, old), state.trainable, state.old_params)


def compute_gradients(
    objective: Objective,
    state: TrainState,
    frozen: Weights,
    experience: Experience,
    *,
    update: jax.Array,
    on_policy: jax.Array,
) -> tuple[Any, Metrics, Any]:
    """Mean gradient of base and policy losses over microbatches [A, B] and members, their metrics, and the records of
    the old policy that the next update compares with.

    update: its number in the run; fresh: whether the weights are the old policy's.
    """

    def policy(total, given, context: Context):
        loss = jax.value_and_grad(objective.policy, has_aux=True)
        (value, (metrics, old)), gradient = loss(state.trainable, context, *given, on_policy=on_policy)
        count = experience.advantages.shape[1]
        # Chosen rather than multiplied by 0: a gradient through blank members need not be finite.
        total = jax.tree.map(lambda t, g: t + jnp.where(rewards_finite, g / count, 0.0), total, gradient)
        metrics = jax.tree.map(lambda x: jnp.where(rewards_finite, x, jnp.nan), metrics)  # NaN: not measured
        return total, (metrics | {"train_loss": jnp.where(rewards_finite, value, 0.0)}, old)

    def microbatch(total, experience: Experience):
        context = Context(frozen, experience.batch, experience.encoded, state.seed, state.temperature)
        metrics, old = {"train_loss": jnp.zeros(())}, None
        if experience.encoded.clean is not None:
            loss = jax.value_and_grad(objective.base, has_aux=True)
            (value, base), gradient = loss(state.trainable, context, update)
            total = jax.tree.map(jnp.add, total, gradient)
            metrics = base | {"train_loss": value}
        if experience.advantages is not None:
            given = (experience.samples, experience.advantages, experience.old)
            total, (terms, old) = jax.lax.scan(lambda total, sample: policy(total, sample, context), total, given)
            terms = jax.tree.map(lambda x: x.mean(0), terms)
            metrics = metrics | terms | {"train_loss": metrics["train_loss"] + terms["train_loss"]}
        return total, (metrics, old)

    rewards_finite = jnp.asarray(True) if experience.rewards_finite is None else experience.rewards_finite
    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    gradients, (metrics, old) = jax.lax.scan(microbatch, zeros, replace(experience, rewards_finite=None))
    gradients = jax.tree.map(lambda g: g / len(experience.batch["mask"]), gradients)
    return gradients, jax.tree.map(lambda x: x.mean(0), metrics), old


def add_diversity_gradient(
    objective: Objective, state: TrainState, experience: Experience, gradients: Any, metrics: Metrics
) -> tuple[Any, Any, Metrics]:
    """(gradients, the router's running mean, metrics) with the diversity loss of the whole step's conditions.

    Taken by microbatch, a scene that two of them share would count twice, and the running mean would forget A times as
    fast.
    """
    features = experience.features
    if features is None:
        return gradients, None, metrics
    loss = jax.value_and_grad(objective.diversity, has_aux=True)
    (value, (router_mean, routing)), update = loss(
        state.trainable,
        features.reshape(-1, features.shape[-1]),
        experience.batch["condition_weight"].reshape(-1),
        state.router_mean,
    )
    metrics = metrics | routing | {"train_loss": metrics["train_loss"] + value}
    return jax.tree.map(jnp.add, gradients, update), router_mean, metrics


def update_temperature(
    state: TrainState, clip_fraction: jax.Array, settings: StepSettings
) -> tuple[jax.Array, jax.Array]:
    """(τ, clip_fraction) as they stand after this step; both change only at the last step before a renewal."""
    last = settings.sync_due(state.step + 1) & ~jnp.isnan(clip_fraction)
    clip = jnp.where(last, clip_fraction, state.clip_at_sync)
    if not settings.adapt_temperature:
        return state.temperature, clip
    return jnp.where(last, next_temperature(state.temperature, clip), state.temperature), clip


def update_ema(state: TrainState, trainable: Any, decay: float) -> Any:
    """Exponential moving average of the weights, with the decay warmed up as (1 + n)/(10 + n)."""
    if state.ema is None:
        return None
    decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, trainable)
