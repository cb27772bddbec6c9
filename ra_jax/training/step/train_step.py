"""One training step: a pure function of (state, frozen, batch), compiled as one program."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ra_jax.data.batch import Batch
from ra_jax.models.fill_model import Weights
from ra_jax.parallel.collectives import mean_gradients
from ra_jax.rl.losses import adapted_temperature
from ra_jax.training.step.experience import Experience, collect
from ra_jax.training.step.generation import RolloutSettings
from ra_jax.training.step.objective import Metrics, Objective
from ra_jax.training.step.state import TrainState

# What a step reports of its last update alone: in the first the old policy may be the current one.
OF_THE_LAST_UPDATE = ("mean_ratio", "clip_fraction", "approx_kl", "policy_change")


@dataclass(frozen=True)
class StepSettings:
    """updates: of the weights in a step; sync_steps: steps between renewals of the
    old policy (0: none is kept, since the weights that a step begins with are its old policy); ema_decay: 0 = off;
    drift_interval: steps between measurements of drift (0 = never); rollouts: None where nothing is generated."""

    updates: int = 1
    sync_steps: int = 8
    adapt_temperature: bool = False
    ema_decay: float = 0.0
    drift_interval: int = 0
    rollouts: RolloutSettings | None = None

    def renews(self, step: jax.Array) -> jax.Array:
        """Whether a step's weights become the old policy before it."""
        return jnp.asarray(True) if not self.sync_steps else step % self.sync_steps == 0


def make_train_step(objective: Objective, optimizer: optax.GradientTransformation, settings: StepSettings):
    """`train_step(state, frozen, batch, *, axis_name=None) -> (state, metrics)` for `jax.jit` (donate the state).

    The batch's arrays are [A, B, ...] of A microbatches, a scene's records side by side (one may go on in the next);
    metrics are scalars, NaN where a step did not measure one. axis_name: of the replicas under `jax.pmap`, whose B are
    a part of the microbatch.
    """

    def train_step(state: TrainState, frozen: Weights, batch: Batch, *, axis_name: str | None = None):
        renewed = settings.renews(state.step)
        state = replace(state, snapshot=renewed_snapshot(state, renewed))
        experience, measured = collect(
            objective,
            settings.rollouts,
            state,
            frozen,
            batch,
            renewed=renewed,
            drift_interval=settings.drift_interval,
            axis_name=axis_name,
        )
        state, metrics = learn(
            objective, optimizer, settings, state, frozen, batch, experience, fresh=renewed, axis_name=axis_name
        )
        if "clip_fraction" in metrics:
            temperature, clip_at_sync = at_sync(state, metrics["clip_fraction"][-1], settings)
            measured |= {"clip_fraction_at_sync": clip_at_sync, "policy_temperature": state.temperature}
            state = replace(state, temperature=temperature, clip_at_sync=clip_at_sync)
        ema = averaged(state, state.trainable, settings.ema_decay)
        return replace(state, ema=ema, step=state.step + 1), of_the_step(metrics) | measured

    return train_step


def learn(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
    state: TrainState,
    frozen: Weights,
    microbatches: Batch,
    experience: Experience,
    *,
    fresh: jax.Array,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """The step's updates of weights, optimizer and the router's running mean, and metrics of each [updates].

    microbatches: [A, B, ...]; fresh: the weights are the old policy's, until the first update.
    """
    router_mean = state.router_mean  # it moves once a step, however many updates

    def update(carry: tuple[TrainState, Any], number: jax.Array):
        state, old = carry
        gradients, metrics, old = gradients_of(
            objective,
            state,
            frozen,
            microbatches,
            replace(experience, old=old),
            update=state.step * settings.updates + number,
            fresh=fresh & (number == 0),
            axis_name=axis_name,
        )
        gradients, new_mean, metrics = with_diversity(
            objective,
            replace(state, router_mean=router_mean),
            experience.features,
            microbatches["condition_weight"],
            gradients,
            metrics,
            axis_name,
        )
        gradients = jax.tree.map(lambda g: mean_gradients(g, axis_name), gradients)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return (replace(state, trainable=trainable, opt_state=opt_state, router_mean=new_mean), old), metrics

    (state, _), metrics = jax.lax.scan(update, (state, experience.old), jnp.arange(settings.updates))
    return state, metrics


def of_the_step(metrics: Metrics) -> Metrics:
    """Scalars from the metrics of each update [updates]: the mean, or the last (`OF_THE_LAST_UPDATE`)."""
    return {name: x[-1] if name in OF_THE_LAST_UPDATE else x.mean() for name, x in metrics.items()}


def renewed_snapshot(state: TrainState, renewed: jax.Array) -> Any:
    """The old policy: the current weights where it is `renewed`, else what it was."""
    if state.snapshot is None:
        return None
    return jax.tree.map(lambda new, old: jnp.where(renewed, new, old), state.trainable, state.snapshot)


def gradients_of(
    objective: Objective,
    state: TrainState,
    frozen: Weights,
    microbatches: Batch,
    experience: Experience,
    *,
    update: jax.Array,
    fresh: jax.Array,
    axis_name: str | None,
) -> tuple[Any, Metrics, Any]:
    """Mean gradient of base and policy losses over microbatches [A, B] and members, their metrics, and the records of
    the old policy that the next update compares with."""

    def policy(total, given, batch, encoded):
        members, advantages, old = given
        loss = jax.value_and_grad(objective.policy, has_aux=True)
        (value, (metrics, old)), gradient = loss(
            state.trainable,
            frozen,
            batch,
            encoded,
            members,
            advantages,
            old,
            state,
            fresh=fresh,
            axis_name=axis_name,
        )
        count = experience.advantages.shape[1]
        # Chosen rather than multiplied by 0: a gradient through blank members need not be finite.
        total = jax.tree.map(lambda t, g: t + jnp.where(sound, g / count, 0.0), total, gradient)
        metrics = jax.tree.map(lambda x: jnp.where(sound, x, jnp.nan), metrics)  # NaN: not measured
        return total, (metrics | {"train_loss": jnp.where(sound, value, 0.0)}, old)

    def microbatch(total, given):
        batch, experience = given
        metrics, old = {"train_loss": jnp.zeros(())}, None
        if experience.encoded.clean is not None:
            loss = jax.value_and_grad(objective.base, has_aux=True)
            (value, base), gradient = loss(
                state.trainable, frozen, batch, experience.encoded, state.seed, update, axis_name=axis_name
            )
            total = jax.tree.map(jnp.add, total, gradient)
            metrics = base | {"train_loss": value}
        if experience.advantages is not None:
            given = (experience.members, experience.advantages, experience.old)
            total, (terms, old) = jax.lax.scan(
                lambda total, member: policy(total, member, batch, experience.encoded), total, given
            )
            terms = jax.tree.map(lambda x: x.mean(0), terms)
            metrics = metrics | terms | {"train_loss": metrics["train_loss"] + terms["train_loss"]}
        return total, (metrics, old)

    sound = jnp.asarray(True) if experience.sound is None else experience.sound
    experience = replace(experience, sound=None)
    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    gradients, (metrics, old) = jax.lax.scan(microbatch, zeros, (microbatches, experience))
    gradients = jax.tree.map(lambda g: g / len(microbatches["mask"]), gradients)
    return gradients, jax.tree.map(lambda x: x.mean(0), metrics), old


def with_diversity(objective, state, features, weights, gradients, metrics, axis_name) -> tuple[Any, Any, Metrics]:
    """(gradients, the router's running mean, metrics) with the diversity loss of the whole step's conditions.

    features: [A, B, F]; weights: [A, B]. Taken by microbatch, a scene that two of them share would count twice, and
    the running mean would forget A times as fast.
    """
    if features is None:
        return gradients, None, metrics
    loss = jax.value_and_grad(objective.diversity, has_aux=True)
    (value, (router_mean, routing)), update = loss(
        state.trainable,
        features.reshape(-1, features.shape[-1]),
        weights.reshape(-1),
        state.router_mean,
        axis_name=axis_name,
    )
    metrics = metrics | routing | {"train_loss": metrics["train_loss"] + value}
    return jax.tree.map(jnp.add, gradients, update), router_mean, metrics


def at_sync(state: TrainState, clip_fraction: jax.Array, settings: StepSettings) -> tuple[jax.Array, jax.Array]:
    """(τ, clip_fraction) as they stand after this step; both change only at the last step before a renewal."""
    last = settings.renews(state.step + 1) & ~jnp.isnan(clip_fraction)
    clip = jnp.where(last, clip_fraction, state.clip_at_sync)
    if not settings.adapt_temperature:
        return state.temperature, clip
    return jnp.where(last, adapted_temperature(state.temperature, clip), state.temperature), clip


def averaged(state: TrainState, trainable: Any, decay: float) -> Any:
    """Exponential moving average of the weights, with the decay warmed up as (1 + n)/(10 + n)."""
    if state.ema is None:
        return None
    decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, trainable)
