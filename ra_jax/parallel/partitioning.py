"""Where parameters and activations live on a mesh of devices with the axes data, fsdp and tensor.

    data     the batch is shared out, weights are repeated
    fsdp     the batch is shared out, and so are weights at rest: a block's are gathered when it is computed
             (ZeRO-3, Rajbhandari et al. 1910.02054)
    tensor   attention heads and MLP features are shared out (Megatron-LM, Shoeybi et al. 1909.08053)

One table says it for all parameters, and for what has their names: gradients, optimizer state, averages. Functions here
do nothing where no such mesh is in force (`jax.set_mesh`): on one device, and under pmap.
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

# By the end of a parameter's name: the axes of its last dimensions; blocks stacked before them are not divided.
# The heads' and features' side of a layer is on `tensor`: attention and the MLP between two layers stay on a device
# (but a single block's proj_out takes both as one input, which is shared out anew before it).
_FEATURES_OUT = r"(to_[qkv]|add_[qkv]_proj|net/0/proj|proj_mlp)"
_FEATURES_IN = r"(to_out/0|to_add_out|net/2|proj_out)"
RULES: tuple[tuple[str, P], ...] = (
    (rf"{_FEATURES_OUT}/kernel$", P(FSDP, TENSOR)),
    (rf"{_FEATURES_OUT}/(bias|kernel_scale)$", P(TENSOR)),
    (rf"{_FEATURES_OUT}/lora_b$", P(None, (TENSOR, FSDP))),
    (rf"{_FEATURES_IN}/kernel$", P(TENSOR, FSDP)),
    (rf"{_FEATURES_IN}/lora_a$", P((TENSOR, FSDP), None)),
    (r"/(kernel|lora_a)$", P(FSDP, None)),
    (r"/lora_b$", P(None, FSDP)),
)
STACKED = r"(transformer_blocks|vision/layers)/"
REPEATED = r"(^|/)(vae|router)/"  # small, and convolutions' kernels are no matrices


def partition_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """Which mesh axes divide each dimension of the parameter of this name, such as
    "trainable/flux/transformer_blocks/attn/to_q/lora_a".

    sizes: of the mesh's axes. A dimension that its axes do not divide stays whole.
    """
    rule = None
    if not re.search(REPEATED, name):
        rule = next((spec for pattern, spec in RULES if re.search(pattern, name)), None)
    if rule is None or len(shape) < len(rule):
        return P()
    spec = (None,) * (len(shape) - len(rule)) + tuple(rule)
    return P(*(_dividing(axes, side, sizes) for axes, side in zip(spec, shape, strict=True)))


def _dividing(axes: str | tuple[str, ...] | None, side: int, sizes: Mapping[str, int]) -> str | tuple[str, ...] | None:
    """The axes of more than one device that together divide `side`; None where there are none."""
    chosen, parts = [], 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        if sizes[axis] > 1 and side % (parts * sizes[axis]) == 0:
            chosen.append(axis)
            parts *= sizes[axis]
    return tuple(chosen) if len(chosen) > 1 else next(iter(chosen), None)


def parameter_name(path: tuple, separator: str = "/") -> str:
    """A leaf's name, such as "trainable/flux/transformer_blocks/attn/to_q/lora_a", from its path.

    path: in a pytree, or in a flat `nnx.State`, whose paths are of plain keys.
    """
    # Flax ends a variable's path in a pytree in an attribute of its own choosing.
    return jax.tree_util.keystr(path, simple=True, separator=separator).removesuffix(f"{separator}value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their `parameter_name`."""
    return {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@dataclass(frozen=True)
class Placement:
    """Puts weights where they are to live on a mesh: each device's part of them on it, and nothing anywhere else."""

    mesh: Mesh

    def sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where the parameter of this name and shape lives."""
        return NamedSharding(self.mesh, partition_spec(name, shape, self.mesh.shape))

    def shardings(self, tree: Any) -> Any:
        """Where every leaf of a state or of weights lives: a pytree of NamedShardings. Only shapes are read."""
        return jax.tree_util.tree_map_with_path(lambda path, x: self.sharding(parameter_name(path), x.shape), tree)

    def put(self, name: str, value: np.ndarray) -> jax.Array:
        """A parameter of this name, such as "flux/x_embedder/kernel", that is in this process's memory."""
        return jax.make_array_from_callback(value.shape, self.sharding(name, value.shape), lambda index: value[index])


def axis_sizes() -> Mapping[str, int]:
    """Sizes of the axes of the mesh in force; empty where there is none with these axes, or of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape) if set(AXES) <= set(mesh.axis_names) and mesh.size > 1 else {}


def batch_shards() -> int:
    """Into how many parts the batch is shared out."""
    sizes = axis_sizes()
    return sizes[DATA] * sizes[FSDP] if sizes else 1


def shard_batch(tree: Any, *, axis: int = 0) -> Any:
    """Pytree of arrays whose dimension `axis` counts records: each device holds its part of them.

    Records that the devices cannot share out evenly, such as a preview's, are left where they are.
    """
    if not axis_sizes():
        return tree

    def share(x: jax.Array) -> jax.Array:
        spec = P(*[None] * axis, batch_axes(x.shape[axis]))
        return x if spec[axis] is None else jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(share, tree)


def batch_axes(records: int) -> tuple[str, ...] | None:
    """The axes that share out so many records; None where they do not divide them."""
    return BATCH if records % batch_shards() == 0 else None


def gather_params(params: Any) -> Any:
    """Parameters about to be used: brought together from `fsdp`, still divided over `tensor`.

    Stacked blocks stay as they are: the loop over them gathers one block at a time, under its own names. Gradients
    are summed over the batch's axes.
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
