"""Blocks of a kind as one module: stacked on a leading axis, run by one loop, and what is saved for its gradient."""

import re
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ra_jax.models.attention import ATTENTION_RESIDUALS, Rope
from ra_jax.models.lora import PRODUCT, Adapter
from ra_jax.parallel.partitioning import STACKED, gather_params, parameter_name, shard_batch


def _saves(*names: str) -> Callable:
    """A policy that saves what has one of these names, and what cuDNN's attention, which names nothing, needs."""
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(primitive, *args: Any, **parameters: Any):
        return "dot_product_attention_fwd" in primitive.name or named(primitive, *args, **parameters)

    return policy


# What the backward pass of a block finds saved, beside the block's input; None: everything.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "products": _saves(ATTENTION_RESIDUALS, PRODUCT),
    "blocks": _saves(ATTENTION_RESIDUALS),
    "full": jax.checkpoint_policies.nothing_saveable,
}

# A few blocks run unrolled: CPUs run them 10-30 % faster than a loop, and compile them not much slower.
UNROLL_UP_TO = 8


def stack_blocks(block: Callable[..., nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module | None:
    """`count` blocks as one module whose parameters have a leading block axis; None for no blocks."""
    if count == 0:
        return None
    return nnx.vmap(lambda rngs: block(rngs=rngs))(rngs.split(count))


def scan_blocks(
    blocks: nnx.Module | None,
    carry: Any,
    *,
    embedding: jax.Array,
    rope: Rope,
    adapter: Adapter | None,
    remat: str,
) -> Any:
    """Run stacked blocks on `carry`, one after another; dropout keys are folded by block number.

    Parameters may be `unstack_blocks`'s.
    """
    if blocks is None:
        return carry
    graphdef, params = nnx.split(blocks)
    leaves = jax.tree.leaves(params, is_leaf=_is_apart)
    count = len(leaves[0])

    def step(carry, layer):
        index, params = layer
        carry, params = shard_batch(carry), gather_params(params)
        block_adapter = adapter if adapter is None else adapter.fold_in(index)
        return nnx.merge(graphdef, params)(carry, embedding, rope, block_adapter), None

    unroll = count <= UNROLL_UP_TO
    if (policy := REMAT_POLICIES[remat]) is not None:
        # A loop's body is safe from the compiler's merging the recomputation with the first computation.
        step = jax.checkpoint(step, policy=policy, prevent_cse=unroll)
    if not any(map(_is_apart, leaves)):
        return jax.lax.scan(step, carry, (jnp.arange(count), params), unroll=unroll)[0]
    layers = [jax.tree.map(itemgetter(index), params, is_leaf=_is_apart) for index in range(count)]
    for layer in enumerate(layers):
        carry, _ = step(carry, layer)
    return carry


def unstack_blocks(params: Any) -> Any:
    """A transformer's parameters, or some of them, with a tuple of arrays for each stacked one of few blocks.

    To take a block's kernel from a stack, XLA's CPU compiler copies it in every step.
    """

    def apart(path: tuple, x: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        few = re.search(STACKED, "/" + parameter_name(path)) and len(x) <= UNROLL_UP_TO
        return tuple(x) if few else x

    return jax.tree_util.tree_map_with_path(apart, params)


def _is_apart(x: Any) -> bool:
    return isinstance(x, tuple)
