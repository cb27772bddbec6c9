"""Encode the images of a microbatch to latents and conditions, with the frozen weights."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from ra_jax.data.batch import Batch
from ra_jax.flow.regions import region_weights
from ra_jax.inference.sampling import as_diptych, diptych_condition, diptych_mask
from ra_jax.models.conditioning import Condition
from ra_jax.models.fill_model import FillModel, Weights, apply_mask
from ra_jax.rl.strength import PolicyStrength
from ra_jax.training.step.state import example_keys, stream_key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncodedBatch:
    """An encoded microbatch of B records.

    Attributes:
        condition: condition of the network.
        clean: x0 [B, N, 4C], latents of the results; None if the records have no results.
        region: weights of mean_Ω [B, N, 4].
    """

    condition: Condition
    clean: jax.Array | None
    region: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossContext:
    """Inputs of a microbatch's losses, besides the trainable parameters.

    Attributes:
        frozen: the frozen weights.
        batch: the microbatch.
        encoded: the microbatch, encoded.
        seed: seed of the run's random draws.
        temperature: τ of the policy's log-probability.
        strength: weights of the policy loss; None unless the estimator is contrast.
    """

    frozen: Weights
    batch: Batch
    encoded: EncodedBatch
    seed: jax.Array
    temperature: jax.Array
    strength: PolicyStrength | None


def encode(model: FillModel, frozen: Weights, batch: Batch, loss_region: str) -> EncodedBatch:
    """Encode the images of a batch to latents, the mean of the VAE's posterior. No gradient flows through them.

    A batch from a pack with latents already contains the latents, so that no image is encoded.
    """
    region = region_weights(diptych_mask(batch), model.factor, loss_region)
    if "masked_latents" in batch:
        return EncodedBatch(diptych_condition(model, frozen, batch), batch.get("result_latents"), region)
    diptychs = [apply_mask(as_diptych(batch, "source"), diptych_mask(batch))]
    if "result" in batch:
        diptychs.append(as_diptych(batch, "result"))
    # lax.map() encodes masked photo and result one after the other. The program then has only one copy of the encoder,
    # and needs the memory of only one image per record.
    masked_latents, *clean = jax.lax.map(partial(model.encode, frozen), jnp.stack(diptychs))
    condition = diptych_condition(model, frozen, batch, masked_latents=masked_latents)
    return EncodedBatch(condition, clean[0] if clean else None, region)


def group_keys(batch: Batch, seed: jax.Array) -> jax.Array:
    """Derive the keys [B] of the policy's pairs (t, ε) from (seed, epoch, group).

    All records of a group get the same key, regardless of their position in the batch.
    """
    return example_keys(stream_key(seed, "policy"), batch["epoch"], batch["group_id"])
