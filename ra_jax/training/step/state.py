"""The state of a run: everything that a step changes and a checkpoint keeps, and the streams of its random numbers."""

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "trainable",
        "opt_state",
        "old_params",
        "ema",
        "router_mean",
        "temperature",
        "clip_at_sync",
        "step",
        "seed",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """What a step changes and a checkpoint keeps.

    trainable: experts and router (or the transformer), float32; opt_state: Optax's; old_params: the old policy, None
    without one; ema: averaged weights, None without; router_mean: the running mean gate [E], None without experts;
    temperature: τ; clip_at_sync: clip_fraction at the last step before the latest renewal of the old policy; step:
    int32; seed: int32, here so that one compiled program serves every seed.
    """

    trainable: Any
    opt_state: Any
    old_params: Any
    ema: Any
    router_mean: jax.Array | None
    temperature: jax.Array
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
    """The state before step 0. Copies are real copies, since the state's buffers are donated to each step."""

    def copy():
        return jax.tree.map(jnp.copy, trainable)

    return TrainState(
        trainable=trainable,
        opt_state=_copy_shared(optimizer.init(trainable), trainable),
        old_params=copy() if with_old_params else None,
        ema=copy() if with_ema else None,
        router_mean=jnp.full((num_experts,), 1.0 / num_experts, jnp.float32) if num_experts else None,
        temperature=jnp.asarray(temperature, jnp.float32),
        clip_at_sync=jnp.full((), jnp.nan, jnp.float32),  # not measured yet
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.int32),
    )


def _copy_shared(opt_state: Any, trainable: Any) -> Any:
    """The optimizer's state with copies of what it shares with the weights: prodigy keeps those it began with."""
    shared = {id(leaf) for leaf in jax.tree.leaves(trainable)}
    return jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in shared else leaf, opt_state)


def stream_key(seed: int | jax.Array, name: str) -> jax.Array:
    """The key of a named stream of random numbers; a draw folds in the step (or epoch) and the global example's id."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def example_keys(key: jax.Array, *ids: jax.Array) -> jax.Array:
    """One key for each example: `key` with every one of `ids` [B] folded in, in order. Returns [B] keys.

    Each key depends on the example's global id alone, so that draws do not depend on how a batch is laid out.
    """
    keys = jnp.broadcast_to(key, ids[0].shape)
    for column in ids:
        keys = jax.vmap(jax.random.fold_in)(keys, column)
    return keys
