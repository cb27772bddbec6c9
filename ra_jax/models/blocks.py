"""Transformer blocks, stacked on a leading axis and run by one loop, and what they save for the backward pass."""

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


def _save_names(*names: str) -> Callable:
    """Return a `jax.checkpoint` policy that saves arrays with these names and the outputs of cuDNN's attention.

    The outputs of cuDNN's attention have no names. The policy recognizes them by the primitive that computes them.
    """
    name_policy = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(primitive, *args: Any, **parameters: Any):
        return "dot_product_attention_fwd" in primitive.name or name_policy(primitive, *args, **parameters)

    return policy


# Policies that choose which arrays a block saves for its backward pass, besides its input. None saves all arrays.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "products": _save_names(ATTENTION_RESIDUALS, PRODUCT),
    "blocks": _save_names(ATTENTION_RESIDUALS),
    "full": jax.checkpoint_policies.nothing_saveable,
}

# A loop over at most this many blocks is unrolled. CPUs run the unrolled blocks 10-30 % faster than the loop, and
# compiling them takes only a little longer.
MAX_UNROLLED_BLOCKS = 8


def stack_blocks(block: Callable[..., nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module | None:
    """Create `count` blocks as one module whose parameters have a leading block axis; None if `count` is 0."""
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
    """Apply stacked blocks to `carry` one after another.

    Args:
        blocks: blocks from `stack_blocks`. `unstack_blocks` may have split their parameters. None: no blocks, so that
            `carry` is returned unchanged.
        carry: input of the first block.
        embedding: passed to every block.
        rope: passed to every block.
        adapter: passed to every block, with the block's index folded into the dropout keys.
        remat: a key of `REMAT_POLICIES`.

    Returns:
        the output of the last block.
    """
    if blocks is None:
        return carry
    graphdef, params = nnx.split(blocks)
    leaves = jax.tree.leaves(params, is_leaf=_is_unstacked)
    count = len(leaves[0])

    def step(carry, layer):
        index, params = layer
        carry, params = shard_batch(carry), gather_params(params)
        block_adapter = adapter if adapter is None else adapter.fold_in(index)
        return nnx.merge(graphdef, params)(carry, embedding, rope, block_adapter), None

    unroll = count <= MAX_UNROLLED_BLOCKS
    if (policy := REMAT_POLICIES[remat]) is not None:
        # prevent_cse keeps XLA from merging the recomputation with the forward pass. XLA cannot merge them in a loop,
        # so only unrolled blocks need it.
        step = jax.checkpoint(step, policy=policy, prevent_cse=unroll)
    if not any(map(_is_unstacked, leaves)):
        return jax.lax.scan(step, carry, (jnp.arange(count), params), unroll=unroll)[0]
    layers = [jax.tree.map(itemgetter(index), params, is_leaf=_is_unstacked) for index in range(count)]
    for layer in enumerate(layers):
        carry, _ = step(carry, layer)
    return carry


def unstack_blocks(params: Any) -> Any:
    """Split the parameters of stacks of at most `MAX_UNROLLED_BLOCKS` blocks into one array per block.

    Each stacked parameter becomes a tuple of arrays. With a stacked parameter, XLA's CPU program would copy each
    block's kernel out of the stack in every step. Separate arrays avoid this copy.

    Args:
        params: all parameters of a transformer, or some of them.
    """

    def unstack(path: tuple, x: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        is_stacked = re.search(STACKED, "/" + parameter_name(path))
        return tuple(x) if is_stacked and len(x) <= MAX_UNROLLED_BLOCKS else x

    return jax.tree_util.tree_map_with_path(unstack, params)


def _is_unstacked(x: Any) -> bool:
    return isinstance(x, tuple)
