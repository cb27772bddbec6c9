"""Placement of parameters and activations on a mesh of devices with the axes data, fsdp and tensor.

    data     shards the batch; weights are replicated
    fsdp     shards the batch and the stored weights; the weights of a block are gathered when it is computed
             (ZeRO-3, Rajbhandari et al. 1910.02054)
    tensor   shards attention heads and MLP features (Megatron-LM, Shoeybi et al. 1909.08053)

The table `RULES` applies to all parameters, and to all arrays with a parameter's name: gradients, optimizer state and
averaged weights. Functions here that shard or gather arrays use the mesh of `jax.set_mesh`. Without a mesh, as on one
device and under pmap, they return arrays unchanged.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
BATCH = (DATA, FSDP)

# Maps the end of a parameter's name to the axes that shard its last dimensions. The leading dimension of stacked blocks
# is not sharded. `tensor` shards the outputs of layers that compute heads or MLP features, and the inputs of layers
# that read them. Attention and the MLP in between need no communication. The exception is proj_out of a single block:
# its input concatenates heads and MLP features, and is resharded first.
_FEATURE_OUTPUTS = r"(to_[qkv]|add_[qkv]_proj|net/0/proj|proj_mlp)"
_FEATURE_INPUTS = r"(to_out/0|to_add_out|net/2|proj_out)"
RULES: tuple[tuple[str, P], ...] = (
    (rf"{_FEATURE_OUTPUTS}/kernel$", P(FSDP, TENSOR)),
    (rf"{_FEATURE_OUTPUTS}/(bias|kernel_scale)$", P(TENSOR)),
    (rf"{_FEATURE_OUTPUTS}/lora_b$", P(None, (TENSOR, FSDP))),
    (rf"{_FEATURE_INPUTS}/kernel$", P(TENSOR, FSDP)),
    (rf"{_FEATURE_INPUTS}/lora_a$", P((TENSOR, FSDP), None)),
    (r"/(kernel|lora_a)$", P(FSDP, None)),
    (r"/lora_b$", P(None, FSDP)),
)
STACKED = r"(transformer_blocks|vision/layers)/"
REPLICATED = r"(^|/)(vae|router)/"  # these weights are small, and kernels of convolutions are not matrices


def partition_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """Return the mesh axes that shard each dimension of a parameter.

    A dimension is not sharded over axes that do not divide it evenly.

    Args:
        name: the parameter's name, such as "trainable/flux/transformer_blocks/attn/to_q/lora_a".
        shape: the parameter's shape.
        sizes: the sizes of the mesh axes.
    """
    rule = None
    if not re.search(REPLICATED, name):
        rule = next((spec for pattern, spec in RULES if re.search(pattern, name)), None)
    if rule is None or len(shape) < len(rule):
        return P()
    spec = (None,) * (len(shape) - len(rule)) + tuple(rule)
    return P(*(_usable_axes(axes, length, sizes) for axes, length in zip(spec, shape, strict=True)))


def _usable_axes(
    axes: str | tuple[str, ...] | None, length: int, sizes: Mapping[str, int]
) -> str | tuple[str, ...] | None:
    """Return the axes that can shard a dimension of this length; None if there are none.

    These are the axes of `axes` that have more than one device and together divide the length evenly.
    """
    usable, shards = [], 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        if sizes[axis] > 1 and length % (shards * sizes[axis]) == 0:
            usable.append(axis)
            shards *= sizes[axis]
    return tuple(usable) if len(usable) > 1 else next(iter(usable), None)


def parameter_name(path: tuple, separator: str = "/") -> str:
    """Return the name of the leaf at `path`, such as "trainable/flux/transformer_blocks/attn/to_q/lora_a".

    `path` is a path in a pytree, or in a flat `nnx.State`, where a path is a tuple of plain keys.
    """
    # In a pytree, the path of a Flax variable ends in the attribute `value`.
    return jax.tree_util.keystr(path, simple=True, separator=separator).removesuffix(f"{separator}value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by name (`parameter_name`)."""
    return {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@dataclass(frozen=True)
class Placement:
    """Places weights on a mesh: each device receives its own part and nothing else."""

    mesh: Mesh

    def sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """Return the sharding of a parameter with this name and shape."""
        return NamedSharding(self.mesh, partition_spec(name, shape, self.mesh.shape))

    def shardings(self, tree: Any) -> Any:
        """Return the shardings of all leaves of a state or of weights, as a pytree. Only shapes are used."""
        return jax.tree_util.tree_map_with_path(lambda path, x: self.sharding(parameter_name(path), x.shape), tree)

    def put(self, name: str, value: np.ndarray) -> jax.Array:
        """Place a parameter, such as "flux/x_embedder/kernel", from this process's memory on the mesh."""
        return jax.make_array_from_callback(value.shape, self.sharding(name, value.shape), lambda index: value[index])


def axis_sizes() -> Mapping[str, int]:
    """Return the axis sizes of the current mesh; empty if it lacks one of `AXES`, or has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape) if set(AXES) <= set(mesh.axis_names) and mesh.size > 1 else {}


def batch_shards() -> int:
    """Return the number of shards of the batch on the current mesh."""
    sizes = axis_sizes()
    return sizes[DATA] * sizes[FSDP] if sizes else 1


def shard_batch(tree: Any, *, axis: int = 0) -> Any:
    """Shard a pytree of arrays over the devices along dimension `axis`, the one of records.

    If the devices do not divide the records evenly, as in previews, the arrays are returned unchanged.
    """
    if not axis_sizes():
        return tree

    def shard(x: jax.Array) -> jax.Array:
        spec = P(*[None] * axis, batch_axes(x.shape[axis]))
        return x if spec[axis] is None else jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(shard, tree)


def batch_axes(records: int) -> tuple[str, ...] | None:
    """Return the axes that shard this number of records; None if they do not divide it evenly."""
    return BATCH if records % batch_shards() == 0 else None


def gather_params(params: Any) -> Any:
    """Gather parameters over `fsdp` before they are used; they stay sharded over `tensor`.

    Stacked blocks stay sharded here. The loop over the blocks calls this function for one block at a time, and the
    names in a single block lack the prefix `STACKED`. XLA sums the gradients of gathered parameters over
    the axes that shard the batch.
    """
    sizes = axis_sizes()
    if not sizes:
        return params

    def gather(path: tuple, x: jax.Array) -> jax.Array:
        name = "/" + parameter_name(path)
        if re.search(STACKED, name):
            return x
        spec = partition_spec(name, x.shape, {**sizes, FSDP: 1})
        return jax.lax.with_sharding_constraint(x, spec)

    return jax.tree_util.tree_map_with_path(gather, params)
