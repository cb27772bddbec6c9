"""A microbatch as the network sees it: conditions and results as latents, by frozen weights."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from ra_jax.data.batch import Batch
from ra_jax.flow.regions import region_weights
from ra_jax.inference.sampling import as_diptych, diptych_condition, diptych_mask
from ra_jax.models.conditioning import Condition
from ra_jax.models.fill_model import FillModel, Weights, apply_mask
from ra_jax.training.step.state import example_keys, stream_key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Encoded:
    """clean: x0 of the results [B, N, 4C], None where there are none; region: mean_Ω's weights [B, N, 4]."""

    condition: Condition
    clean: jax.Array | None
    region: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What the losses of a microbatch are functions of beside the trainable parameters.

    seed: of the run's random draws; temperature: τ of the policy's log-probability.
    """

    frozen: Weights
    batch: Batch
    encoded: Encoded
    seed: jax.Array
    temperature: jax.Array


def encode(model: FillModel, frozen: Weights, batch: Batch, loss_region: str) -> Encoded:
    """Images to latents, by frozen weights: nothing here is differentiated. The VAE's mean is used.

    A batch of a pack with latents brings them.
    """
    region = region_weights(diptych_mask(batch), model.factor, loss_region)
    if "masked_latents" in batch:
        return Encoded(diptych_condition(model, frozen, batch), batch.get("result_latents"), region)
    photos = [apply_mask(as_diptych(batch, "source"), diptych_mask(batch))]
    if "result" in batch:
        photos.append(as_diptych(batch, "result"))
    # One after another in a loop: one copy of the encoder to compile, and memory for one photo a record.
    masked_latents, *clean = jax.lax.map(partial(model.encode, frozen), jnp.stack(photos))
    condition = diptych_condition(model, frozen, batch, masked_latents=masked_latents)
    return Encoded(condition, clean[0] if clean else None, region)


def group_keys(batch: Batch, seed: jax.Array) -> jax.Array:
    """Keys [B] of the policy's (t, ε): of (seed, epoch, group), so that a group shares them wherever it stands."""
    return example_keys(stream_key(seed, "policy"), batch["epoch"], batch["group_id"])
