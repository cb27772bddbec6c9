"""From a batch of panels to pictures with the objects removed: diptych, condition, ODE, decode, in one program."""

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
    """The reference beside the photo of that name, uint8 panels [B, h, w, 3] -> float32 [B, h, 2w, 3] in [0, 1]."""
    return join(batch["reference"], batch[photo]).astype(jnp.float32) / 255.0


def diptych_mask(batch: Batch) -> jax.Array:
    """The mask of the diptych, [B, h, 2w] float32, 0 on the left panel."""
    return join_mask(batch["mask"]).astype(jnp.float32)


def diptych_condition(
    model: FillModel, frozen: Weights, batch: Batch, *, masked_latents: jax.Array | None = None
) -> Condition:
    """The condition of removing the mask's object from `source`, shown the `reference` (and its Redux tokens).

    masked_latents [B, N, 4C]: of the photo with the mask's pixels grey, where they are known; those, and the Redux
    tokens, of a batch that has them are taken as they are.
    """
    tokens = batch.get("image_tokens")
    if tokens is None and model.redux is not None:
        tokens = model.image_tokens(frozen, batch["redux_pixels"])
    if masked_latents is None:
        masked_latents = batch.get("masked_latents")
    image = as_diptych(batch, "source") if masked_latents is None else None
    return model.condition(frozen, image, diptych_mask(batch), image_tokens=tokens, masked_latents=masked_latents)


def initial_noise(model: FillModel, keys: jax.Array, height: int, width: int) -> jax.Array:
    """ε [B, N, 4C] of a diptych of panels [height, width], each image's from its own key alone."""
    shape = (2 * height * width // model.multiple**2, model.latent_features)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def make_remover(
    model: FillModel, schedule: FlowSchedule, *, num_inference_steps: int, guidance_scale: float
) -> Callable[[Weights, Weights, Batch, jax.Array], tuple[jax.Array, jax.Array | None]]:
    """Compiled `remove(trainable, frozen, batch, noise) -> (images, gates)`.

    batch: uint8 panels `source`, `reference` [B, h, w, 3], `mask` [B, h, w], and `redux_pixels`; noise [B, N, 4C] of
    the diptych's N tokens (`initial_noise`). Returns the right panels [B, h, w, 3] in [0, 1], clipped, before any
    blending with the source, and the router's gates [B, E] (None without experts).
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
