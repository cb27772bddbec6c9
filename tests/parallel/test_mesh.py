"""Meshes that fit their devices and meshes that do not, and the sharding of parameters by name."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from ra_jax.config.settings import ParallelConfig
from ra_jax.errors import ConfigError
from ra_jax.models.flux import FluxConfig
from ra_jax.parallel.collectives import map_microbatches
from ra_jax.parallel.mesh import check_batch, check_heads, check_width, make_mesh
from ra_jax.parallel.partitioner import MeshPartitioner, PmapPartitioner, make_partitioner
from ra_jax.parallel.partitioning import partition_spec
from ra_jax.training import setup as setting_up
from ra_jax.training.setup import set_up

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}
BLOCK = "trainable/flux/transformer_blocks"


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        (f"{BLOCK}/attn/to_q/kernel", (19, 64, 64), P(None, "fsdp", "tensor")),
        (f"{BLOCK}/attn/to_q/bias", (19, 64), P(None, "tensor")),
        (f"{BLOCK}/attn/to_q/lora_a", (19, 64, 12), P(None, "fsdp", None)),
        (f"{BLOCK}/attn/to_q/lora_b", (19, 12, 64), P(None, None, ("tensor", "fsdp"))),
        (f"{BLOCK}/ff/net/2/kernel", (19, 256, 64), P(None, "tensor", "fsdp")),
        (f"{BLOCK}/ff/net/2/lora_a", (19, 256, 12), P(None, ("tensor", "fsdp"), None)),
        (f"{BLOCK}/norm1/linear/kernel", (19, 64, 384), P(None, "fsdp", None)),
        ("opt_state/1/0/mu/flux/transformer_blocks/attn/to_q/lora_a", (19, 64, 12), P(None, "fsdp", None)),
        ("frozen/flux/x_embedder/kernel", (384, 64), P("fsdp", None)),
        ("frozen/flux/x_embedder/kernel", (6, 64), P(None, None)),  # fsdp does not divide 6
        ("frozen/vae/encoder/conv_in/kernel", (3, 3, 4, 128), P()),
        ("trainable/router/hidden/kernel", (66, 32), P()),
        ("step", (), P()),
    ],
)
def test_the_table_shards_parameters_and_arrays_with_their_names(name, shape, spec):
    assert partition_spec(name, shape, SIZES) == spec


def test_axes_of_one_device_shard_nothing():
    assert partition_spec(f"{BLOCK}/attn/to_q/kernel", (19, 64, 64), SIZES | {"fsdp": 1}) == P(None, None, "tensor")


def test_a_mesh_of_another_number_of_devices_is_refused():
    devices = jax.devices() * 8
    with pytest.raises(ConfigError, match=r"--mesh_fsdp 3 .*make 6 devices, and there are 8.* of 1, 2, 4, 8"):
        make_mesh(-1, 3, devices=devices)
    with pytest.raises(ConfigError, match="make 16 devices, and there are 8"):
        make_mesh(4, 4, devices=devices)
    with pytest.raises(ConfigError, match="expected sizes of 1 or more"):
        make_mesh(-1, 0, devices=devices)


def test_batches_and_heads_that_a_mesh_does_not_divide_are_refused():
    mesh = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))
    check_batch(mesh, 16)
    with pytest.raises(ConfigError, match=r"train_batch_size = 12 .*2 x 4 = 8 devices; give --train_batch_size 16"):
        check_batch(mesh, 12)
    check_heads(mesh, 24)
    with pytest.raises(ConfigError, match=r"--mesh_tensor 2 does not divide the transformer's 9 .*; give one of 1$"):
        check_heads(mesh, 9)
    check_width(mesh, 3072)
    with pytest.raises(ConfigError, match=r"--mesh_fsdp 4 does not divide .* width of 30, .* give one of 1, 2$"):
        check_width(mesh, 30)


@pytest.mark.parametrize(("heads", "message"), [(9, "--mesh_tensor 2 does not"), (2, "--mesh_fsdp 8 does not")])
def test_a_partitioner_refuses_a_transformer_that_its_mesh_does_not_divide(heads, message):
    partitioner = MeshPartitioner(AbstractMesh((1, 8, 2), ("data", "fsdp", "tensor")))
    flux = FluxConfig(num_attention_heads=heads, attention_head_dim=14, axes_dims_rope=(4, 4, 6))
    with pytest.raises(ConfigError, match=message):
        partitioner.check(heads=flux.num_attention_heads, width=flux.inner_dim)


@dataclass(frozen=True)
class Chip:
    """The attributes of a device that JAX reads to build a mesh."""

    id: int
    slice_index: int
    platform: str
    process_index: int = 0
    device_kind: str = "some"


def test_slices_of_chips_are_joined_by_data_and_nodes_of_gpus_by_any_axis():
    nodes = [Chip(i, i % 2, "gpu") for i in range(4)]
    assert make_mesh(fsdp=4, devices=nodes).shape == {"data": 1, "fsdp": 4, "tensor": 1}
    joined = make_mesh(fsdp=2, devices=nodes).devices[:, :, 0]
    assert [[chip.slice_index for chip in row] for row in joined] == [[0, 0], [1, 1]]
    uneven = [Chip(i, i // 3, "gpu") for i in range(4)]
    assert make_mesh(devices=uneven).shape == {"data": 4, "fsdp": 1, "tensor": 1}
    slices = [Chip(i, i // 4, "tpu") for i in range(8)]
    message = r"2 slices of 4 chips .* is 1; give --mesh_data 2 --mesh_fsdp 2 --mesh_tensor 2$"
    with pytest.raises(ConfigError, match=message):
        make_mesh(fsdp=4, tensor=2, devices=slices)


def test_pmap_uses_no_mesh_and_shards_whole_conditions():
    with pytest.raises(ConfigError, match="uses no mesh: leave --mesh_data, --mesh_fsdp and --mesh_tensor out"):
        make_partitioner(ParallelConfig(parallelism="pmap", mesh_fsdp=2))
    assert list(make_partitioner(ParallelConfig(parallelism="pmap")).rows(3)) == [0, 1, 2]
    with pytest.raises(ConfigError, match="= 6 cannot be divided evenly over 4 replicas; give --train_batch_size 8"):
        PmapPartitioner(AbstractMesh((4,), ("replica",))).rows(6)


def test_heads_are_checked_before_any_weights_are_read(make_config, monkeypatch):
    def refuse(self, *, heads, width):
        raise ConfigError(f"{heads} heads")

    monkeypatch.setattr(MeshPartitioner, "check", refuse)
    monkeypatch.setattr("ra_jax.training.setup.load_fill_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="heads"):
        set_up(make_config())


@pytest.mark.parametrize(("size", "calls"), [(1, 1), (4, 3), (6, 6), (100, 6)])
def test_microbatches_are_of_the_largest_size_that_divides_the_rows(size, calls):
    """`calls` is the number of rows in each call of the function."""
    row_counts = []

    def double(x):
        row_counts.append(x.shape[0])
        return 2.0 * x

    x = jnp.arange(18.0).reshape(6, 3)
    np.testing.assert_array_equal(map_microbatches(double, x, size), 2 * x)
    assert set(row_counts) == {calls}


def test_weights_that_do_not_fit_a_device_are_refused_under_pmap(make_config, monkeypatch):
    monkeypatch.setattr(setting_up, "device_memory", lambda: 10**5)
    with pytest.raises(ConfigError, match=r"\(0\.\d GB\) on each device, and a device has 0\.0 GB: .*--mesh_fsdp 1"):
        set_up(make_config(parallelism="pmap"))
