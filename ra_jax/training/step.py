"""One training step: a pure function of (state, frozen, batch), compiled as one program."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ra_jax.inference.sampling import Batch
from ra_jax.models.fill_model import Weights
from ra_jax.rl.losses import adapted_temperature
from ra_jax.training.mesh import all_mean, mean_gradients
from ra_jax.training.objective import Encoded, Metrics, Objective
from ra_jax.training.state import TrainState


@dataclass(frozen=True)
class StepSettings:
    """accumulation: microbatches a step; sync_steps: steps between renewals of the old policy; ema_decay: 0 = off;
    drift_interval: steps between measurements of `velocity_norm_ratio` (0 = never)."""

    accumulation: int = 1
    sync_steps: int = 8
    adapt_temperature: bool = False
    ema_decay: float = 0.0
    drift_interval: int = 0


def make_train_step(objective: Objective, optimizer: optax.GradientTransformation, settings: StepSettings):
    """`train_step(state, frozen, batch, *, axis_name=None) -> (state, metrics)` for `jax.jit` (donate the state).

    The batch's arrays are [accumulation·B, ...], a scene's records side by side (one may go on in the next batch);
    metrics are scalars.
    """

    def train_step(state: TrainState, frozen: Weights, batch: Batch, *, axis_name: str | None = None):
        fresh = state.step % settings.sync_steps == 0
        snapshot = renewed_snapshot(state, fresh)

        def microbatch(gradients, batch):
            encoded = encode_with_old_policy(objective, state, snapshot, frozen, batch, fresh)
            loss = jax.value_and_grad(objective, has_aux=True)
            (_, metrics), update = loss(
                state.trainable, frozen, batch, encoded, state, fresh=fresh, axis_name=axis_name
            )
            metrics |= drift_metrics(objective, state, frozen, batch, encoded, settings.drift_interval, axis_name)
            return jax.tree.map(jnp.add, gradients, update), (metrics, objective.features(encoded))

        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        microbatches = jax.tree.map(lambda x: x.reshape(settings.accumulation, -1, *x.shape[1:]), batch)
        gradients, (metrics, features) = jax.lax.scan(microbatch, zeros, microbatches)
        metrics = jax.tree.map(lambda x: x.mean(0), metrics) | reward_metrics(batch, axis_name)
        gradients = jax.tree.map(lambda g: g / settings.accumulation, gradients)
        gradients, router_mean, metrics = with_diversity(
            objective, state, features, batch["condition_weight"], gradients, metrics, axis_name
        )
        gradients = jax.tree.map(lambda g: mean_gradients(g, axis_name), gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        temperature, clip_at_sync = state.temperature, state.clip_at_sync
        if "clip_fraction" in metrics:
            temperature, clip_at_sync = at_sync(state, metrics["clip_fraction"], settings)
            metrics |= {"clip_fraction_at_sync": clip_at_sync, "policy_temperature": state.temperature}
        state = replace(
            state,
            trainable=trainable,
            opt_state=opt_state,
            snapshot=snapshot,
            ema=averaged(state, trainable, settings.ema_decay),
            router_mean=router_mean,
            temperature=temperature,
            clip_at_sync=clip_at_sync,
            step=state.step + 1,
        )
        return state, metrics

    return train_step


def renewed_snapshot(state: TrainState, fresh: jax.Array) -> Any:
    """The old policy: the current weights where it is `fresh`, else what it was."""
    if state.snapshot is None:
        return None
    return jax.tree.map(lambda new, old: jnp.where(fresh, new, old), state.trainable, state.snapshot)


def encode_with_old_policy(objective, state, snapshot, frozen, batch, fresh) -> Encoded:
    """The encoded microbatch with ℓ_old; where the old policy is fresh its pass is skipped (ρ is 1 by construction)."""
    encoded = objective.encode(frozen, batch, state.seed)
    if encoded.cache is None:
        return encoded
    old = jax.lax.cond(
        fresh,
        lambda: jnp.zeros(encoded.clean.shape[:1], jnp.float32),
        lambda: objective.log_prob(snapshot, frozen, encoded, state.temperature)[0],
    )
    return replace(encoded, old_log_prob=old)


def with_diversity(objective, state, features, weights, gradients, metrics, axis_name) -> tuple[Any, Any, Metrics]:
    """(gradients, the router's running mean, metrics) with the diversity loss of the whole step's conditions.

    features: [accumulation, B, F]. Taken by microbatch, a scene that two of them share would count twice, and the
    running mean would forget `accumulation` times as fast.
    """
    if features is None:
        return gradients, None, metrics
    loss = jax.value_and_grad(objective.diversity, has_aux=True)
    (value, (router_mean, routing)), update = loss(
        state.trainable, features.reshape(-1, features.shape[-1]), weights, state.router_mean, axis_name=axis_name
    )
    metrics = metrics | routing | {"train_loss": metrics["train_loss"] + value}
    return jax.tree.map(jnp.add, gradients, update), router_mean, metrics


def reward_metrics(batch: Batch, axis_name: str | None) -> Metrics:
    """Means over the records: reward and each score; over distinct scenes: within-group std, share of dead groups."""
    if "reward" not in batch:
        return {}
    removal, background, smoothness = all_mean(batch["scores"], axis_name)
    scenes = batch["condition_weight"]
    return {
        "mean_reward": all_mean(batch["reward"], axis_name),
        "reward_std": all_mean(batch["group_reward_std"], axis_name, scenes),
        "frac_reward_zero_std": all_mean(batch["dead_group"], axis_name, scenes),
        "removal_score": removal,
        "background_score": background,
        "smoothness_score": smoothness,
    }


def drift_metrics(objective, state, frozen, batch, encoded, interval: int, axis_name) -> Metrics:
    """`velocity_norm_ratio` at the last step of every `interval` steps; NaN (not measured) at the others."""
    if not interval or objective.model.router is None:
        return {}
    return {
        "velocity_norm_ratio": jax.lax.cond(
            (state.step + 1) % interval == 0,
            lambda: objective.velocity_norm_ratio(state, frozen, batch, encoded, axis_name),
            lambda: jnp.full((), jnp.nan, jnp.float32),
        )
    }


def at_sync(state: TrainState, clip_fraction: jax.Array, settings: StepSettings) -> tuple[jax.Array, jax.Array]:
    """(τ, clip_fraction) as they stand after this step; both change only at the last step before a renewal."""
    last = (state.step + 1) % settings.sync_steps == 0
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
