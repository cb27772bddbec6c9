"""Initial values of parameters, drawn by XLA's own random number generator.

JAX's default generator (threefry) takes about a second of compile time on CPU for every new shape, and a small network
has dozens of shapes. XLA's generator takes a tenth of that. Its numbers may differ between kinds of devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def draw_with_xla(initializer: Callable) -> Callable:
    """Return a version of `initializer`, (key, shape, dtype) -> array, that draws with XLA's generator."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        words = jnp.resize(jax.random.key_data(key), 4)
        return initializer(jax.random.wrap_key_data(words, impl="rbg"), shape, dtype)

    return initialize


lecun_normal = draw_with_xla(nnx.initializers.lecun_normal())
