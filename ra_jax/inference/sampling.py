"""Sample removals for a batch of panels: diptych, condition, ODE and decoding in one compiled program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ra_jax.data.batch import Batch
from ra_jax.data.diptych import join, join_mask, right_panel
from ra_jax.flow.samplers import sample_euler
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.models.conditioning import Condition
from ra_jax.models.fill_model import FillModel, Weights
from ra_jax.models.lora import Adapter


def as_diptych(batch: Batch, photo: str) -> jax.Array:
    """Join the reference (left) and the panel named `photo` (right) into a diptych.

    Panels are uint8 [B, h, w, 3]; the diptych is float32 [B, h, 2w, 3] in [0, 1].
    """
    return join(batch["reference"], batch[photo]).astype(jnp.float32) / 255.0


def diptych_mask(batch: Batch) -> jax.Array:
    """Return the mask of the diptych, [B, h, 2w] float32; it is 0 on the left panel."""
    return join_mask(batch["mask"]).astype(jnp.float32)


def diptych_condition(
    model: FillModel, frozen: Weights, batch: Batch, *, masked_latents: jax.Array | None = None
) -> Condition:
    """Compute the condition for removing the masked object from `source`.

    If the batch has `image_tokens`, these replace the Redux encoding of `redux_pixels`. If the batch has
    `masked_latents`, these replace the VAE encoding of the masked diptych.

    Args:
        model: the model.
        frozen: frozen weights of the model.
        batch: uint8 panels `source` and `reference` [B, h, w, 3] and `mask` [B, h, w]; `redux_pixels` if the model has
            Redux.
        masked_latents: latents [B, N, 4C] of the diptych with the masked pixels gray. They replace `masked_latents` of
            the batch.
    """
    tokens = batch.get("image_tokens")
    if tokens is None and model.redux is not None:
        tokens = model.image_tokens(frozen, batch["redux_pixels"])
    if masked_latents is None:
        masked_latents = batch.get("masked_latents")
    image = as_diptych(batch, "source") if masked_latents is None else None
    return model.condition(frozen, image, diptych_mask(batch), image_tokens=tokens, masked_latents=masked_latents)


def initial_noise(model: FillModel, keys: jax.Array, height: int, width: int) -> jax.Array:
    """Draw the noise ε [B, N, 4C] for diptychs of panels [height, width]; row i depends only on keys[i]."""
    shape = (2 * height * width // model.size_multiple**2, model.latent_features)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def make_remover(
    model: FillModel, schedule: FlowSchedule, *, num_inference_steps: int, guidance_scale: float
) -> Callable[[Weights, Weights, Batch, jax.Array], tuple[jax.Array, jax.Array | None]]:
    """Return a jitted function `remove(trainable, frozen, batch, noise) -> (images, gates)`.

    The parameters and results of `remove` are:
        trainable, frozen: weights of the model.
        batch: uint8 panels `source` and `reference` [B, h, w, 3] and `mask` [B, h, w]; `redux_pixels` if the model has
            Redux.
        noise: [B, N, 4C] for the N tokens of the diptych (`initial_noise`).
        images: right panels [B, h, w, 3], clipped to [0, 1], not blended with the source.
        gates: the router's gates [B, E]; None without experts.
    """

    @jax.jit
    def remove(trainable: Weights, frozen: Weights, batch: Batch, noise: jax.Array):
        condition = diptych_condition(model, frozen, batch)
        gates, _ = model.gates(trainable, condition)

        def velocity(x, t):
            return model.velocity(
                trainable, frozen, x, t, condition, adapter=Adapter(gates), guidance_scale=guidance_scale
            )

        latents = sample_euler(velocity, noise, schedule.sampling_times(num_inference_steps, noise.shape[1]))
        images = right_panel(model.decode(frozen, latents, condition.grid))
        return jnp.clip(images, 0.0, 1.0), gates

    return remove
