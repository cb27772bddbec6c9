"""Partitioners run a step on several devices: by `jax.jit` over a mesh, or by `jax.pmap` over replicas.

Both give the same results. A partitioner places the state, the weights and the batches on devices, and compiles steps
for these devices. Code outside of steps uses a state without the replica axis of pmap. `unshard` returns it for
checkpoints, `addressable` for previews and the drift guard.
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
    """Places arrays on devices and compiles steps for them.

    Attributes:
        placement: where weights are placed while they are loaded; None for the default device.
        shards: number of shards of a batch.
    """

    placement: Placement | None
    shards: int

    def check(self, *, heads: int, width: int) -> None:
        """Raise ConfigError if a transformer with this number of attention heads and this width cannot be sharded."""

    def rows(self, batch_size: int) -> np.ndarray:
        """Return the indices of the rows of a global microbatch that this process loads.

        Raises ConfigError if the devices do not divide the microbatch evenly.
        """

    def scope(self) -> AbstractContextManager:
        """Context manager that sets the mesh for functions that are compiled outside of steps (previews, drift)."""

    def init(self, function: Callable[..., Any], *weights: Any) -> Any:
        """Compute `function(*weights)` without a replica axis, as `shard` takes it. The weights may be donated."""

    def shard(self, tree: Any) -> Any:
        """Convert state or weights without a replica axis to the layout that steps use."""

    def unshard(self, tree: Any) -> Any:
        """Remove the replica axis that steps use, so that checkpoints can save state or weights."""

    def addressable(self, tree: Any) -> Any:
        """Return the weights without a replica axis, so that this process can compute with them inside `scope`."""

    def put_batch(self, batch: dict[str, np.ndarray], microbatches: int) -> dict[str, jax.Array]:
        """Make the global batch [A, B, ...] of A microbatches from the rows [A·B_local, ...] of every process."""

    def compile(self, step: Step, state: Any, frozen: Any, batch: Any) -> jax.stages.Compiled:
        """Compile the step. The state is donated. Only shapes, dtypes and shardings of the arguments are used."""


@dataclass(frozen=True)
class MeshPartitioner:
    """`jax.jit` over a mesh: weights and optimizer are sharded by `partitioning.RULES`, batches over data and fsdp."""

    mesh: Mesh

    @property
    def placement(self) -> Placement:
        """The placement of weights by `partitioning.RULES`."""
        return Placement(self.mesh)

    @property
    def shards(self) -> int:
        """Number of shards of a batch: data · fsdp."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def check(self, *, heads: int, width: int) -> None:
        """Check that the size of the tensor axis divides the number of heads, and that of the fsdp axis the width."""
        check_heads(self.mesh, heads)
        check_width(self.mesh, width)

    def rows(self, batch_size: int) -> np.ndarray:
        """Return the indices of the rows of a global microbatch that this process's devices hold."""
        return process_rows(self.mesh, batch_size)

    def scope(self) -> AbstractContextManager:
        """Context manager that sets the mesh."""
        return jax.set_mesh(self.mesh)

    def init(self, function: Callable[..., Any], *weights: Any) -> Any:
        """Compute the result of `function`, sharded by `partitioning.RULES`; the weights are donated."""
        shardings = self.placement.shardings(jax.eval_shape(function, *weights))
        return jax.jit(function, out_shardings=shardings, donate_argnums=tuple(range(len(weights))))(*weights)

    def shard(self, tree: Any) -> Any:
        """Shard state or weights over the mesh by `partitioning.RULES`."""
        return jax.device_put(tree, self.placement.shardings(tree))

    def unshard(self, tree: Any) -> Any:
        """Return the state unchanged: it is already one copy, sharded over the mesh."""
        return tree

    def addressable(self, tree: Any) -> Any:
        """Return the weights unchanged: programs outside of steps also run on the mesh."""
        return tree

    def put_batch(self, batch: dict[str, np.ndarray], microbatches: int) -> dict[str, jax.Array]:
        """Shard the rows over data and fsdp: [A·B_local, ...] -> [A, B, ...]."""
        sharding = NamedSharding(self.mesh, P(None, BATCH))

        def put(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(sharding, x.reshape(microbatches, -1, *x.shape[1:]))

        return jax.tree.map(put, batch)

    def compile(self, step: Step, state: Any, frozen: Any, batch: Any) -> jax.stages.Compiled:
        """Compile the step by `jax.jit`. The state is donated and sharded by `RULES`; the metrics are replicated."""
        arguments = abstract((state, frozen, batch))
        out_shardings = (self.placement.shardings(state), NamedSharding(self.mesh, P()))
        with self.scope():
            lowered = jax.jit(step, donate_argnums=0, out_shardings=out_shardings).lower(*arguments)
        return compile_lowered(lowered, self.mesh.devices.flat[0].platform)


@dataclass(frozen=True)
class PmapPartitioner:
    """`jax.pmap`: every device has a copy of all weights and a part of the batch.

    The copies are placed once, as one array with a leading replica axis.

    Attributes:
        mesh: the devices, with the single axis `replica`.
        placement: always None, because weights are loaded onto the default device.
    """

    mesh: Mesh
    placement: None = None

    @property
    def shards(self) -> int:
        """Number of shards of a batch: one per replica."""
        return self.mesh.size

    def check(self, *, heads: int, width: int) -> None:
        """Do nothing: every device has all heads and features."""

    def rows(self, batch_size: int) -> np.ndarray:
        """Return the indices of this process's rows of a global microbatch. All processes have equally many rows.

        Raises ConfigError if the replicas do not divide the microbatch evenly.
        """
        if batch_size % self.shards:
            next_size = -(-batch_size // self.shards) * self.shards
            raise ConfigError(
                f"train_batch_size = {batch_size} cannot be divided evenly over {self.shards} replicas; give "
                f"--train_batch_size {next_size}, or another multiple of {self.shards}"
            )
        count = batch_size // jax.process_count()
        return np.arange(jax.process_index() * count, (jax.process_index() + 1) * count)

    def scope(self) -> AbstractContextManager:
        """Context manager that does nothing: programs outside of steps run on a single device."""
        return nullcontext()

    def init(self, function: Callable[..., Any], *weights: Any) -> Any:
        """Compute the result of `function` on the default device."""
        return function(*weights)

    def shard(self, tree: Any) -> Any:
        """Place a copy on every replica, as one array with a leading axis: [...] -> [replicas, ...]."""
        devices, sharding = self.mesh.local_devices, NamedSharding(self.mesh, P(REPLICA))

        def replicate(x: jax.Array) -> jax.Array:
            value = np.asarray(x)[None]  # on the host, since one device may not hold all copies
            shards = [jax.device_put(value, device) for device in devices]
            return jax.make_array_from_single_device_arrays((self.shards, *x.shape), sharding, shards)

        return jax.tree.map(replicate, tree)

    def unshard(self, tree: Any) -> Any:
        """Return the replicas' copies as one replicated array: [replicas, ...] -> [...]."""
        replicated = NamedSharding(self.mesh, P())

        def merge(x: jax.Array) -> jax.Array:
            copies = [shard.data[0] for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape[1:], replicated, copies)

        return jax.tree.map(merge, tree)

    def addressable(self, tree: Any) -> Any:
        """Return this process's first copy, on one device: [replicas, ...] -> [...]."""
        # The copy is on one device, because the compiler can neither shard nor replicate a Pallas kernel.
        return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)

    def put_batch(self, batch: dict[str, np.ndarray], microbatches: int) -> dict[str, jax.Array]:
        """Shard the rows over the replicas: [A·B_local, ...] -> [replicas, A, B / replicas, ...]."""
        sharding, replicas = NamedSharding(self.mesh, P(REPLICA)), len(self.mesh.local_devices)

        def put(x: np.ndarray) -> jax.Array:
            by_replica = x.reshape(microbatches, replicas, -1, *x.shape[1:]).swapaxes(0, 1)
            return jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(by_replica))

        return jax.tree.map(put, batch)

    def compile(self, step: Step, state: Any, frozen: Any, batch: Any) -> jax.stages.Compiled:
        """Compile the step by `jax.pmap`, with reductions over the replica axis; the state is donated."""
        mapped = jax.pmap(partial(step, axis_name=REPLICA), axis_name=REPLICA, donate_argnums=0)
        return compile_lowered(mapped.lower(*abstract((state, frozen, batch))), self.mesh.devices.flat[0].platform)


def make_partitioner(config: ParallelConfig) -> Partitioner:
    """Build the partitioner that the settings name, over all devices.

    Raises ConfigError if the mesh settings do not fit the devices or the kind of partitioner.
    """
    if config.parallelism == "mesh":
        return MeshPartitioner(make_mesh(config.mesh_data, config.mesh_fsdp, config.mesh_tensor))
    if (config.mesh_fsdp, config.mesh_tensor) != (1, 1) or config.mesh_data not in (-1, jax.device_count()):
        raise ConfigError(
            f"--parallelism pmap keeps a copy of the weights on each of the {jax.device_count()} devices and uses no "
            "mesh: leave --mesh_data, --mesh_fsdp and --mesh_tensor out, or give --parallelism mesh"
        )
    return PmapPartitioner(Mesh(np.asarray(jax.devices()), (REPLICA,)))


def abstract(tree: Any) -> Any:
    """Return the shapes, dtypes and shardings of a pytree of arrays, as ShapeDtypeStructs."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def scalars(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return a step's metrics as scalars; under pmap, the copy of this process's first replica."""
    return {name: x if np.ndim(x) == 0 else x.addressable_data(0)[0] for name, x in metrics.items()}


def fetch(x: jax.Array) -> np.ndarray:
    """Copy an array to the host, even if other processes hold parts of it. All processes must call this function."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
