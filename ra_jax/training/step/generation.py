"""Automatic mode's members: rollouts of the current weights, decoded and scored, inside the compiled step.

Members are visited one after another, one of every condition at a time, so that memory does not grow with their number.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.data.diptych import right_panel
from ra_jax.flow.samplers import window_starts
from ra_jax.models.fill_model import Weights
from ra_jax.models.lora import Adapter
from ra_jax.parallel.collectives import map_microbatches
from ra_jax.rewards.custom import Reward
from ra_jax.rewards.registry import RewardInputs
from ra_jax.rl.rollouts import NoisySteps, Sample, panel_noise, roll_out
from ra_jax.training.step.encode import Context
from ra_jax.training.step.objective import Objective
from ra_jax.training.step.settings import RolloutSettings
from ra_jax.training.step.state import TrainState, example_keys, stream_key


def generate_samples(
    objective: Objective, settings: RolloutSettings, state: TrainState, context: Context
) -> tuple[Sample, jax.Array]:
    """G rollouts of every condition by the current weights, and their scores [G, B, S].

    Draws derive from (seed, step, record, member); of the initial noise all members share the left panel's.
    """
    model, condition = objective.model, context.encoded.condition
    times = objective.schedule.sampling_times(settings.steps, condition.fill.shape[1])
    group_keys = example_keys(
        jax.random.fold_in(stream_key(state.seed, "rollouts"), state.step), context.batch["record_id"]
    )
    gates_of_all, _ = model.gates(state.trainable, condition)
    noisy = choose_noisy_steps(settings, times, state)
    inputs = reward_inputs(objective, settings, context)

    def generate(_, number):
        shared_keys = example_keys(group_keys, jnp.zeros(group_keys.shape, jnp.int32))
        sample_keys = example_keys(group_keys, jnp.broadcast_to(number + 1, group_keys.shape))
        gates, experts = sample_experts(settings, gates_of_all, sample_keys)

        def noise(draw):
            keys = [example_keys(keys, jnp.broadcast_to(draw, keys.shape)) for keys in (shared_keys, sample_keys)]
            return panel_noise(*keys, condition.grid, model.latent_features)

        def velocity(x, t):
            return objective.velocity(state.trainable, context.frozen, x, t, condition, Adapter(gates))

        sample = replace(roll_out(velocity, noise, times, noisy), experts=experts)
        image = decode_panels(objective, settings, context.frozen, sample.clean, condition.grid)
        return None, (sample, score(settings.rewards, replace(inputs, image=image)))

    _, (samples, scores) = jax.lax.scan(generate, None, jnp.arange(settings.generations))
    return samples, scores


def score(rewards: Sequence[Reward], inputs: RewardInputs) -> jax.Array:
    """Every reward of a batch of images, [B, S]."""
    scores = [reward.function(inputs)[:, None] for reward in rewards]
    return jnp.concatenate(scores, axis=1) if scores else jnp.zeros((len(inputs.image), 0))


def choose_noisy_steps(settings: RolloutSettings, times: np.ndarray, state: TrainState) -> NoisySteps | None:
    """This step's window of noisy steps, the same for all rollouts."""
    if not settings.noisy_steps:
        return None
    starts = jnp.asarray(window_starts(times, settings.noisy_steps))
    key = jax.random.fold_in(stream_key(state.seed, "window"), state.step)
    return NoisySteps(jax.random.choice(key, starts), settings.noisy_steps, settings.noise_level)


def sample_experts(
    settings: RolloutSettings, gates: jax.Array | None, keys: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """Gates [B, E] of a member and, with `sample` routing, the expert [B] that each rollout drew from the router's."""
    if not settings.sample_experts:
        return gates, None
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 2**31 - 1))(keys)
    experts = jax.vmap(jax.random.categorical)(keys, jnp.log(gates))
    return jax.nn.one_hot(experts, gates.shape[-1]), experts


def reward_inputs(objective: Objective, settings: RolloutSettings, context: Context) -> RewardInputs:
    """All that rewards are told but the image: the photo, its mask and, where there is one, the truth as it is and as
    the VAE gives it back."""
    batch, encoded = context.batch, context.encoded
    source, mask = (batch[name].astype(jnp.float32) for name in ("source", "mask"))
    if encoded.clean is None:
        return RewardInputs(image=source / 255.0, source=source / 255.0, mask=mask)
    return RewardInputs(
        image=source / 255.0,
        source=source / 255.0,
        mask=mask,
        target=batch["result"].astype(jnp.float32) / 255.0,
        target_decoded=decode_panels(objective, settings, context.frozen, encoded.clean, encoded.condition.grid),
    )


def decode_panels(
    objective: Objective, settings: RolloutSettings, frozen: Weights, latents: jax.Array, grid
) -> jax.Array:
    """Photos [B, h, w, 3] in [0, 1], clipped, of diptychs' latents [B, N, 4C]; each device decodes `decode_batch_size`
    at a time."""

    def decode(latents):
        return jnp.clip(right_panel(objective.model.decode(frozen, latents, grid)), 0.0, 1.0)

    return map_microbatches(decode, latents, settings.decode_batch_size)
