"""Generate, decode and score the rollouts of automatic mode, inside the compiled step.

The G rollouts of a condition are generated one after another, each for all conditions of the microbatch at once. The
memory for network, decoder and rewards therefore does not grow with G.
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
    """Generate G rollouts of every condition with the current weights. Returns them [G, B, ...] and scores [G, B, S].

    Noise and drawn experts depend only on (seed, step, record, number of the rollout). All rollouts of a condition
    share the noise of the left panel, at the start and in each noisy step.
    """
    model, condition = objective.model, context.encoded.condition
    times = objective.schedule.sampling_times(settings.steps, condition.fill.shape[1])
    group_keys = example_keys(
        jax.random.fold_in(stream_key(state.seed, "rollouts"), state.step), context.batch["record_id"]
    )
    router_gates, _ = model.gates(state.trainable, condition)
    noisy_steps = choose_noisy_steps(settings, times, state)
    inputs = reward_inputs(objective, settings, context)

    def generate_sample(_, number):
        shared_keys = example_keys(group_keys, jnp.zeros(group_keys.shape, jnp.int32))
        sample_keys = example_keys(group_keys, jnp.broadcast_to(number + 1, group_keys.shape))
        gates, experts = sample_experts(settings, router_gates, sample_keys)

        def draw_noise(draw):
            keys = [example_keys(keys, jnp.broadcast_to(draw, keys.shape)) for keys in (shared_keys, sample_keys)]
            return panel_noise(*keys, condition.grid, model.latent_features)

        def velocity(x, t):
            return objective.velocity(state.trainable, context.frozen, x, t, condition, Adapter(gates))

        sample = replace(roll_out(velocity, draw_noise, times, noisy_steps), experts=experts)
        image = decode_panels(objective, settings, context.frozen, sample.clean, condition.grid)
        return None, (sample, score(settings.rewards, replace(inputs, image=image)))

    _, (samples, scores) = jax.lax.scan(generate_sample, None, jnp.arange(settings.generations))
    return samples, scores


def score(rewards: Sequence[Reward], inputs: RewardInputs) -> jax.Array:
    """Compute all S rewards of a batch of images, [B, S]."""
    scores = [reward.function(inputs)[:, None] for reward in rewards]
    return jnp.concatenate(scores, axis=1) if scores else jnp.zeros((len(inputs.image), 0))


def choose_noisy_steps(settings: RolloutSettings, times: np.ndarray, state: TrainState) -> NoisySteps | None:
    """Draw this step's window of noisy steps, the same for all rollouts; None for the ODE sampler."""
    if not settings.noisy_steps:
        return None
    starts = jnp.asarray(window_starts(times, settings.noisy_steps))
    key = jax.random.fold_in(stream_key(state.seed, "window"), state.step)
    return NoisySteps(jax.random.choice(key, starts), settings.noisy_steps, settings.noise_level)


def sample_experts(
    settings: RolloutSettings, gates: jax.Array | None, keys: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """Return the gates [B, E] of a rollout and, with `sample` routing, the number of the drawn expert [B].

    With `sample` routing each rollout draws one expert with the router's gates as probabilities, and its own gates are
    one-hot. Otherwise the router's gates are returned unchanged, with None.
    """
    if not settings.sample_experts:
        return gates, None
    # No draw of noise has the number 2**31 - 1, so that the expert's key differs from the keys of the noise.
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 2**31 - 1))(keys)
    experts = jax.vmap(jax.random.categorical)(keys, jnp.log(gates))
    return jax.nn.one_hot(experts, gates.shape[-1]), experts


def reward_inputs(objective: Objective, settings: RolloutSettings, context: Context) -> RewardInputs:
    """Return the rewards' inputs: the photo, its mask and, if the records have results, the ground truth.

    The ground truth is given twice: as the record has it, and after encoding and decoding by the VAE. `image` is a
    placeholder (the photo) that the caller replaces by the generated image.
    """
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
    """Decode diptych latents [B, N, 4C] and return the right panels [B, h, w, 3], clipped to [0, 1].

    Each device decodes at most `decode_batch_size` images at once.
    """

    def decode(latents):
        return jnp.clip(right_panel(objective.model.decode(frozen, latents, grid)), 0.0, 1.0)

    return map_microbatches(decode, latents, settings.decode_batch_size)
