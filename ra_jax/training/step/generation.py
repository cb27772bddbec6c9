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
from ra_jax.rl.rollouts import NoisySteps, Sample, diptych_noise, roll_out
from ra_jax.training.step.encode import LossContext
from ra_jax.training.step.objective import Objective
from ra_jax.training.step.settings import RolloutSettings
from ra_jax.training.step.state import TrainState, example_keys, stream_key


def generate_samples(
    objective: Objective, settings: RolloutSettings, state: TrainState, context: LossContext
) -> tuple[Sample, jax.Array]:
    """Generate G rollouts of every condition with the current weights.

    Noise and drawn experts depend only on (seed, step, record, number of the rollout). All rollouts of a condition
    share the noise of the left panel, at the start and in each noisy step.

    Returns:
        The samples [G, B, ...].
        The scores [G, B, S].
    """
    model, condition = objective.model, context.encoded.condition
    times = objective.schedule.sampling_times(settings.num_steps, condition.fill.shape[1])
    condition_keys = example_keys(
        jax.random.fold_in(stream_key(state.seed, "rollouts"), state.step), context.batch["record_id"]
    )
    router_gates, _ = model.gates(state.trainable, condition)
    noisy_steps = choose_noisy_steps(settings, times, state)
    inputs = reward_inputs(objective, settings, context)

    def generate_sample(_, number):
        shared_keys = example_keys(condition_keys, jnp.zeros(condition_keys.shape, jnp.int32))
        sample_keys = example_keys(condition_keys, jnp.broadcast_to(number + 1, condition_keys.shape))
        gates, experts = sample_experts(settings, router_gates, sample_keys)

        def draw_noise(draw):
            keys = [example_keys(keys, jnp.broadcast_to(draw, keys.shape)) for keys in (shared_keys, sample_keys)]
            return diptych_noise(*keys, condition.grid, model.latent_features)

        def velocity(x, t):
            return objective.velocity(state.trainable, context.frozen, x, t, condition, Adapter(gates))

        sample = replace(roll_out(velocity, draw_noise, times, noisy_steps), experts=experts)
        image = decode_panels(objective, settings, context.frozen, sample.clean, condition.grid)
        return None, (sample, score(settings.rewards, replace(inputs, image=image)))

    _, (samples, scores) = jax.lax.scan(generate_sample, None, jnp.arange(settings.num_generations))
    return samples, scores


def score(rewards: Sequence[Reward], inputs: RewardInputs) -> jax.Array:
    """Compute all S rewards of a batch of images, [B, S]."""
    scores = [reward.function(inputs)[:, None] for reward in rewards]
    return jnp.concatenate(scores, axis=1) if scores else jnp.zeros((len(inputs.image), 0))


def choose_noisy_steps(settings: RolloutSettings, times: np.ndarray, state: TrainState) -> NoisySteps | None:
    """Draw this step's window of noisy steps, the same for all rollouts; None for the ODE sampler."""
    if not settings.num_noisy_steps:
        return None
    starts = jnp.asarray(window_starts(times, settings.num_noisy_steps))
    key = jax.random.fold_in(stream_key(state.seed, "window"), state.step)
    return NoisySteps(jax.random.choice(key, starts), settings.num_noisy_steps, settings.noise_level)


def sample_experts(
    settings: RolloutSettings, gates: jax.Array | None, keys: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """Return the gates [B, E] of a rollout, and the index of the drawn expert [B] with `sample` routing.

    With `sample` routing, one expert is drawn for each condition, with the router's gates as probabilities. The
    rollout's gates are one-hot at this expert. With other routings, the router's gates and None are returned.
    """
    if not settings.sample_experts:
        return gates, None
    # No draw of noise has the number 2**31 - 1, so the key of the expert differs from all keys of the noise.
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 2**31 - 1))(keys)
    experts = jax.vmap(jax.random.categorical)(keys, jnp.log(gates))
    return jax.nn.one_hot(experts, gates.shape[-1]), experts


def reward_inputs(objective: Objective, settings: RolloutSettings, context: LossContext) -> RewardInputs:
    """Return the inputs of the rewards: the photo, the mask and, if the records have results, the ground truth.

    The mask is the one in the file (`file_mask`) and not the enlarged one that the model was given. A larger mask would
    judge pixels outside the object, which the ground truth would not pass either.

    `target` is the record's result, and `target_decoded` is the result after encoding and decoding by the VAE. `image`
    is a placeholder (the photo), which the caller replaces by the generated image.
    """
    batch, encoded = context.batch, context.encoded
    source, mask = (batch[name].astype(jnp.float32) for name in ("source", "file_mask"))
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
