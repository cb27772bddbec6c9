"""Meshes of devices with the axes data, fsdp and tensor, and checks that a mesh fits batch and model."""

import math
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ra_jax.errors import ConfigError
from ra_jax.parallel.partitioning import AXES, BATCH


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build a mesh with the axes data, fsdp and tensor over all devices.

    `data` = -1 stands for (number of devices) / (fsdp · tensor).

    Raises ConfigError if the product of the sizes is not the number of devices, or if there are several TPU slices
    and the size of the axis data is not a multiple of their number.
    """
    devices = jax.devices() if devices is None else devices
    flags = f"--mesh_data {data} --mesh_fsdp {fsdp} --mesh_tensor {tensor}"
    if min(fsdp, tensor) < 1 or (data < 1 and data != -1):
        raise ConfigError(f"{flags}: expected sizes of 1 or more, or --mesh_data -1 for all remaining devices")
    inner = fsdp * tensor
    count = inner * data if data > 0 else inner * max(1, len(devices) // inner)
    if count != len(devices):
        advice = f"give sizes of {divisors(len(devices))} whose product is {len(devices)}, or leave --mesh_data out"
        if len(devices) == 1:
            advice = "leave these flags out"
        raise ConfigError(f"{flags}: these sizes make {count} devices, and there are {len(devices)}; {advice}")
    shape = (len(devices) // inner, fsdp, tensor)
    slice_sizes = Counter(getattr(device, "slice_index", 0) for device in devices).values()
    slices = len(slice_sizes)
    if slices > 1 and shape[0] % slices == 0 and len(set(slice_sizes)) == 1:
        slice_shape = (shape[0] // slices, fsdp, tensor)
        grid = mesh_utils.create_hybrid_device_mesh(
            slice_shape, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    elif slices == 1 or devices[0].platform != "tpu":  # a slice of GPUs is a node, and any axis may span nodes
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        slice_chips = len(devices) // slices
        tensor = math.gcd(tensor, slice_chips)
        raise ConfigError(
            f"{flags}: --mesh_data spans the {slices} slices of {slice_chips} chips and must be a multiple of "
            f"{slices}, but it is {shape[0]}; give --mesh_data {slices} --mesh_fsdp {slice_chips // tensor} "
            f"--mesh_tensor {tensor}"
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Return the indices of the rows of a global batch that the devices of this process hold, in order."""
    check_batch(mesh, batch_size)
    indices = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices.values()]))


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raise ConfigError if the size of the global batch is not a multiple of data · fsdp."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH)
    if batch_size % shards:
        raise ConfigError(
            f"train_batch_size = {batch_size} cannot be divided evenly over data x fsdp = {mesh.shape['data']} x "
            f"{mesh.shape['fsdp']} = {shards} devices; give --train_batch_size {-(-batch_size // shards) * shards}, or "
            f"another multiple of {shards}"
        )


def check_heads(mesh: Mesh, heads: int) -> None:
    """Raise ConfigError if the tensor axis does not divide the number of attention heads."""
    tensor = mesh.shape["tensor"]
    if heads % tensor:
        raise ConfigError(
            f"--mesh_tensor {tensor} does not divide the transformer's {heads} attention heads; give one of "
            f"{divisors(heads, mesh.size)}"
        )


def check_width(mesh: Mesh, width: int) -> None:
    """Raise ConfigError if the fsdp axis does not divide the transformer's width: weights would not be sharded."""
    fsdp = mesh.shape["fsdp"]
    if width % fsdp:
        raise ConfigError(
            f"--mesh_fsdp {fsdp} does not divide the transformer's width of {width}, and every device would hold all "
            f"weights; give one of {divisors(width, mesh.size)}"
        )


def divisors(*numbers: int) -> str:
    """List the common divisors of the numbers, for messages."""
    common = math.gcd(*numbers)
    return ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
