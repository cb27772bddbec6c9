"""How a step is launched over devices: by `jax.jit` over a mesh, or by `jax.pmap` over replicas, with the same numbers.

A launch says where state, weights and batches live, and compiles a step for them. What is outside of steps sees one
copy of the state: checkpoints `whole`, previews and drift `local`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ra_jax.config.settings import ParallelConfig
from ra_jax.errors import ConfigError
from ra_jax.parallel.compilation import compile_lowered
from ra_jax.parallel.mesh import check_heads, check_width, make_mesh, process_rows
from ra_jax.parallel.partitioning import BATCH, Placement

Step = Callable[..., tuple[Any, dict[str, jax.Array]]]  # (state, frozen, batch, *, axis_name) -> (state, metrics)

REPLICA = "replica"


class Partitioner(Protocol):
    """placement: where weights are put as they are loaded; shards: parts into which a batch is divided."""

    placement: Placement | None
    shards: int

    def check(self, *, heads: int, width: int) -> None:
        """Raise ConfigError where a transformer of so many attention heads and features cannot be launched so."""

    def rows(self, batch: int) -> np.ndarray:
        """Which rows of a global microbatch this process loads. Raises ConfigError where it cannot be shared out."""

    def scope(self) -> AbstractContextManager:
        """Within, functions that are compiled outside of steps (previews, drift) know of the mesh."""

    def init(self, function: Callable[..., Any], *weights: Any) -> Any:
        """What `function` makes of weights, one copy of it, on the devices where it is to live; takes the weights."""

    def shard(self, tree: Any) -> Any:
        """State or weights of which there is one copy, to where steps want them."""

    def unshard(self, tree: Any) -> Any:
        """One copy of a state or of weights from where steps left them, over all devices: what a checkpoint holds."""

    def addressable(self, tree: Any) -> Any:
        """Weights for what this process computes outside of steps, within `scope`."""

    def put_batch(self, batch: dict[str, np.ndarray], microbatches: int) -> dict[str, jax.Array]:
        """This process's rows [A·B_local, ...], microbatch after microbatch, as the step's [A, B, ...]."""

    def compile(self, step: Step, state: Any, frozen: Any, batch: Any) -> jax.stages.Compiled:
        """The step as a program whose state is donated. Of the arguments only shapes and places are read."""


@dataclass(frozen=True)
class MeshPartitioner:
    """`jax.jit`: weights and optimizer divided by `parallel.partitioning`'s table, batches over data and fsdp."""

    mesh: Mesh

    @property
    def placement(self) -> Placement:
        """Places weights by `parallel.partitioning`'s table."""
        return Placement(self.mesh)

    @property
    def shards(self) -> int:
        """Devices that share out the batch."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def check(self, *, heads: int, width: int) -> None:
        """Check that the tensor axis divides the heads, and the fsdp axis the width."""
        check_heads(self.mesh, heads)
        check_width(self.mesh, width)

    def rows(self, batch: int) -> np.ndarray:
        """Rows of a global microbatch that this process's devices hold."""
        return process_rows(self.mesh, batch)

    def scope(self) -> AbstractContextManager:
        """The mesh in force."""
        return jax.set_mesh(self.mesh)

    def init(self, function: Callable[..., Any], *weights: Any) -> Any:
        """`function`'s result, computed where the table divides it to; the weights are donated."""
        places = self.placement.shardings(jax.eval_shape(function, *weights))
        every = tuple(range(len(weights)))
        return jax.jit(function, out_shardings=places, donate_argnums=every)(*weights)

    def shard(self, tree: Any) -> Any:
        """Divide state or weights over the mesh."""
        return jax.device_put(tree, self.placement.shardings(tree))

    def unshard(self, tree: Any) -> Any:
        """The state as it is: it is one copy, divided over the mesh."""
        return tree

    def addressable(self, tree: Any) -> Any:
        """The weights as they are: programs outside of steps run on the mesh too."""
        return tree

    def put_batch(self, batch: dict[str, np.ndarray], microbatches: int) -> dict[str, jax.Array]:
        """Divide rows over data and fsdp: [A·B_local, ...] -> [A, B, ...]."""
        sharding = NamedSharding(self.mesh, P(None, BATCH))

        def put(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(sharding, x.reshape(microbatches, -1, *x.shape[1:]))

        return jax.tree.map(put, batch)

    def compile(self, step: Step, state: Any, frozen: Any, batch: Any) -> jax.stages.Compiled:
        """The step by `jax.jit`: the state is donated and placed by the table, metrics are on every device."""
        arguments = abstract((state, frozen, batch))
        results = (self.placement.shardings(state), NamedSharding(self.mesh, P()))
        with self.scope():
            lowered = jax.jit(step, donate_argnums=0, out_shardings=results).lower(*arguments)
        return compile_lowered(lowered, self.mesh.devices.flat[0].platform)


@dataclass(frozen=True)
class PmapPartitioner:
    """`jax.pmap`: every device has a copy of all weights, placed once on a leading replica axis, and a part of the
    batch's conditions."""

    mesh: Mesh  # of the one axis `replica`
    placement: None = None

    @property
    def shards(self) -> int:
        """Replicas that share out the batch."""
        return self.mesh.size

    def check(self, *, heads: int, width: int) -> None:
        """Nothing to check: every device has all heads and features."""

    def rows(self, batch: int) -> np.ndarray:
        """Rows of a global microbatch for this process, as many for each.

        Raises ConfigError where the replicas do not divide the microbatch.
        """
        if batch % self.shards:
            raise ConfigError(
                f"train_batch_size = {batch} cannot be shared out over {self.shards} replicas; give --train_batch_size "
                f"{-(-batch // self.shards) * self.shards}, or another multiple of {self.shards}"
            )
        each = batch // jax.process_count()
        return np.arange(jax.process_index() * each, (jax.process_index() + 1) * each)

    def scope(self) -> AbstractContextManager:
        """No mesh: outside of steps one device computes."""
        return nullcontext()

    def init(self, function: Callable[..., Any], *weights: Any) -> Any:
        """`function`'s result on the default device."""
        return function(*weights)

    def shard(self, tree: Any) -> Any:
        """A copy for each replica on a leading axis: [...] -> [replicas, ...]."""
        devices, sharding = self.mesh.local_devices, NamedSharding(self.mesh, P(REPLICA))

        def copies(x: jax.Array) -> jax.Array:
            value = np.asarray(x)[None]  # on the host: one device may not have the room for all copies
            shards = [jax.device_put(value, device) for device in devices]
            return jax.make_array_from_single_device_arrays((self.shards, *x.shape), sharding, shards)

        return jax.tree.map(copies, tree)

    def unshard(self, tree: Any) -> Any:
        """The replicas' copies as one array that every device holds: [replicas, ...] -> [...]."""
        everywhere = NamedSharding(self.mesh, P())

        def one(x: jax.Array) -> jax.Array:
            shards = [shard.data[0] for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape[1:], everywhere, shards)

        return jax.tree.map(one, tree)

    def addressable(self, tree: Any) -> Any:
        """This process's first copy, on one device: [replicas, ...] -> [...]."""
        # On one device: the compiler can neither divide a Pallas kernel over several nor repeat it on each.
        return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)

    def put_batch(self, batch: dict[str, np.ndarray], microbatches: int) -> dict[str, jax.Array]:
        """Divide rows over the replicas: [A·B_local, ...] -> [replicas, A, B / replicas, ...]."""
        sharding, local = NamedSharding(self.mesh, P(REPLICA)), len(self.mesh.local_devices)

        def put(x: np.ndarray) -> jax.Array:
            parts = x.reshape(microbatches, local, -1, *x.shape[1:]).swapaxes(0, 1)
            return jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(parts))

        return jax.tree.map(put, batch)

    def compile(self, step: Step, state: Any, frozen: Any, batch: Any) -> jax.stages.Compiled:
        """The step by `jax.pmap`, which reduces over the axis of the replicas; the state is donated."""
        mapped = jax.pmap(partial(step, axis_name=REPLICA), axis_name=REPLICA, donate_argnums=0)
        return compile_lowered(mapped.lower(*abstract((state, frozen, batch))), self.mesh.devices.flat[0].platform)


def make_partitioner(config: ParallelConfig) -> Partitioner:
    """The launch that the settings ask for, over all devices. Raises ConfigError where they do not fit them."""
    if config.parallelism == "mesh":
        return MeshPartitioner(make_mesh(config.mesh_data, config.mesh_fsdp, config.mesh_tensor))
    if (config.mesh_fsdp, config.mesh_tensor) != (1, 1) or config.mesh_data not in (-1, jax.device_count()):
        raise ConfigError(
            f"--parallelism pmap keeps a copy of the weights on each of the {jax.device_count()} devices and knows no "
            "mesh: leave --mesh_data, --mesh_fsdp and --mesh_tensor out, or give --parallelism mesh"
        )
    return PmapPartitioner(Mesh(np.asarray(jax.devices()), (REPLICA,)))


def abstract(tree: Any) -> Any:
    """Shapes, types and places of a pytree's arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def scalars(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A step's metrics, of which replicas have one each."""
    return {name: x if np.ndim(x) == 0 else x.addressable_data(0)[0] for name, x in metrics.items()}


def fetch(x: jax.Array) -> np.ndarray:
    """An array's values, wherever its parts are; every process has to ask for them."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
