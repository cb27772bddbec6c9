"""Attention behind one function, so that a kernel for one kind of chip is a change in one place; rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np

ROPE_THETA = 10_000

Rope = tuple[jax.Array, jax.Array]  # cosines and sines, [S, head_dim / 2]

# XLA's own fusion runs everywhere; "cudnn" is the fused kernel of NVIDIA cards (bfloat16, head_dim <= 128).
IMPLEMENTATIONS = {"auto": "xla", "xla": "xla", "cudnn": "cudnn"}


def check_implementation(implementation: str) -> str:
    """Return `implementation` if it is a known name.

    Raises:
        ValueError: names the known ones.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is unknown: expected one of {', '.join(IMPLEMENTATIONS)}.")
    return implementation


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """softmax(q kᵀ / √D) v, unmasked, with the softmax in float32 whatever the inputs' type.

    Args:
        q: [B, S, H, D] queries.
        k: [B, T, H, D] keys.
        v: [B, T, H, D] values.
        implementation: one of `IMPLEMENTATIONS`.

    Returns:
        [B, S, H, D] in the type of `q`.

    Raises:
        ValueError: if `implementation` is unknown.
    """
    implementation = IMPLEMENTATIONS[check_implementation(implementation)]
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def rope_table(context_length: int, grid: tuple[int, int], axes_dims: tuple[int, ...]) -> Rope:
    """Cosines and sines of rotary positions, computed in float64 as diffusers' `FluxPosEmbed` does.

    Context tokens are at (0, 0, 0), the image token of row r and column c at (0, r, c).

    Returns:
        two float32 arrays [context_length + rows·cols, sum(axes_dims) / 2].
    """
    rows, cols = grid
    ids = np.zeros((context_length + rows * cols, 3))
    ids[context_length:, 1] = np.repeat(np.arange(rows), cols)
    ids[context_length:, 2] = np.tile(np.arange(cols), rows)
    frequencies = [ROPE_THETA ** (-np.arange(0, dim, 2) / dim) for dim in axes_dims]
    angles = np.concatenate([np.outer(ids[:, axis], f) for axis, f in enumerate(frequencies)], axis=1)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotate each pair of neighbouring features of x [B, S, H, D] by its position's angle."""
    cos, sin = (table[None, :, None, :] for table in rope)
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
