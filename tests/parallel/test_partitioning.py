"""Sharding constraints in traced programs; an abstract mesh without devices is enough."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from ra_jax.parallel.partitioning import AXES, gather_params, shard_batch


@pytest.fixture
def trace_constraints():
    """trace_constraints(function, *arrays) -> the specs of the program's sharding constraints on a 2 x 4 x 2 mesh."""
    mesh = AbstractMesh((2, 4, 2), AXES, axis_types=(AxisType.Auto,) * 3)

    def trace(function, *arrays):
        with jax.sharding.use_abstract_mesh(mesh):
            jaxpr = jax.make_jaxpr(function)(*arrays)
        return [e.params["sharding"].spec for e in jaxpr.eqns if e.primitive.name == "sharding_constraint"]

    return trace


def test_records_are_sharded_if_the_devices_divide_them(trace_constraints):
    batch = P(("data", "fsdp"))
    assert trace_constraints(shard_batch, (jnp.zeros((16, 3)), jnp.zeros(8))) == [batch, batch]
    assert trace_constraints(lambda x: shard_batch(x, axis=1), jnp.zeros((3, 16))) == [P(None, ("data", "fsdp"))]
    assert trace_constraints(shard_batch, jnp.zeros((3, 16))) == []  # such as the batch of a preview


def test_a_blocks_parameters_are_gathered_from_fsdp_and_stay_on_tensor(trace_constraints):
    block = {"attn": {"to_q": {"kernel": jnp.zeros((64, 64)), "lora_a": jnp.zeros((64, 12))}}}
    assert trace_constraints(gather_params, block) == [P(None, "tensor"), P(None, None)]
    model = {"x_embedder": {"kernel": jnp.zeros((384, 64))}, "transformer_blocks": {"stacked": jnp.zeros((2, 64, 64))}}
    assert trace_constraints(gather_params, model) == [P(None, None)]  # stacked blocks are not gathered here


def test_without_a_mesh_there_are_no_constraints():
    jaxpr = jax.make_jaxpr(lambda x: shard_batch(gather_params({"kernel": x})))(jnp.zeros((16, 16)))
    assert not jaxpr.eqns
