"""Tests the random weights for the shapes of a model."""

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.models.geometry import random_weights


def test_random_kernels_have_a_variance_of_one_over_the_number_of_inputs():
    shapes = {
        "kernel": jax.ShapeDtypeStruct((3, 400, 100), jnp.bfloat16),
        "other": jax.ShapeDtypeStruct((3, 400, 100), jnp.bfloat16),
        "bias": jax.ShapeDtypeStruct((100,), jnp.float32),
        "count": jax.ShapeDtypeStruct((2, 3), jnp.int32),
    }
    weights = random_weights(shapes, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), weights) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    np.testing.assert_allclose(np.asarray(weights["kernel"], np.float32).std(), 400**-0.5, rtol=0.02)
    assert not np.array_equal(weights["kernel"], weights["other"])
    assert (weights["bias"] == 1).all() and (weights["count"] == 1).all()
