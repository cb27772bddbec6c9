"""The train state, which a step updates and a checkpoint stores, and the random streams of a run."""

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ra_jax.rl.strength import PolicyStrength


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "trainable",
        "opt_state",
        "old_params",
        "ema",
        "router_mean",
        "temperature",
        "strength",
        "clip_at_sync",
        "step",
        "seed",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """Everything that a step updates and a checkpoint stores.

    Attributes:
        trainable: float32 parameters of experts and router, or of the whole transformer.
        opt_state: state of the Optax optimizer.
        old_params: parameters of the old policy; None if the old policy needs no separate copy.
        ema: averaged weights; None without averaging.
        router_mean: running mean of the gates [E]; None without experts.
        temperature: τ.
        strength: weights of the policy loss; None unless the estimator is contrast.
        clip_at_sync: clip_fraction at the last step before the latest sync of the old policy; NaN until measured.
        step: number of the next step, int32.
        seed: int32. It is part of the state so that one compiled program serves every seed.
    """

    trainable: Any
    opt_state: Any
    old_params: Any
    ema: Any
    router_mean: jax.Array | None
    temperature: jax.Array
    strength: PolicyStrength | None
    clip_at_sync: jax.Array
    step: jax.Array
    seed: jax.Array


def init_state(
    trainable: Any,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    num_experts: int,
    temperature: float,
    with_old_params: bool,
    with_ema: bool,
) -> TrainState:
    """Create the state before step 0, without a strength.

    The old policy and the averaged weights are copies in memory, because the state is donated to each step, and a
    buffer can be donated only once.

    Args:
        trainable: the initial parameters.
        optimizer: the optimizer.
        seed: seed of the run.
        num_experts: E; 0 without experts.
        temperature: initial τ.
        with_old_params: whether the state has a separate old policy.
        with_ema: whether the weights are averaged.
    """

    def copy_trainable():
        return jax.tree.map(jnp.copy, trainable)

    return TrainState(
        trainable=trainable,
        opt_state=_copy_shared_leaves(optimizer.init(trainable), trainable),
        old_params=copy_trainable() if with_old_params else None,
        ema=copy_trainable() if with_ema else None,
        router_mean=jnp.full((num_experts,), 1.0 / num_experts, jnp.float32) if num_experts else None,
        temperature=jnp.asarray(temperature, jnp.float32),
        strength=None,
        clip_at_sync=jnp.full((), jnp.nan, jnp.float32),  # not measured yet
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.int32),
    )


def _copy_shared_leaves(opt_state: Any, trainable: Any) -> Any:
    """Copy leaves of the optimizer state that share a buffer with the weights, such as prodigy's initial weights."""
    weight_ids = {id(leaf) for leaf in jax.tree.leaves(trainable)}
    return jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in weight_ids else leaf, opt_state)


def stream_key(seed: int | jax.Array, name: str) -> jax.Array:
    """Return the key of a named random stream. Each draw folds in the step (or epoch) and the id of the example."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def example_keys(key: jax.Array, *ids: jax.Array) -> jax.Array:
    """Derive one key for each example by folding each of `ids` [B] into `key`, in order. Returns keys [B].

    A key depends only on the ids of its example, so that draws do not depend on the layout of the batch.
    """
    keys = jnp.broadcast_to(key, ids[0].shape)
    for id_column in ids:
        keys = jax.vmap(jax.random.fold_in)(keys, id_column)
    return keys
