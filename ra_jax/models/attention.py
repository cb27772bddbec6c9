"""Attention behind one function, by the kernel of the chips that a program is compiled for; rotary positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from ra_jax.models.partitioning import TENSOR, axis_sizes, batch_axes

ROPE_THETA = 10_000

Rope = tuple[jax.Array, jax.Array]  # cosines and sines, [S, head_dim / 2]

# xla: fused by the compiler, everywhere; cudnn: the kernel of NVIDIA cards (16 bits, head_dim <= 128); splash: the
# Pallas kernel of TPUs (head_dim a multiple of 128).
IMPLEMENTATIONS = ("xla", "cudnn", "splash")
LANES = 128  # a TPU's vector: sequences are padded to a multiple of it
LARGEST_BLOCK = 512


def implementation_for(platform: str, *, dtype: jax.typing.DTypeLike, head_dim: int) -> str:
    """The fastest of `IMPLEMENTATIONS` on "cpu", "gpu" or "tpu", where it can compute such heads.

    platform: that the program will run on, which need not be the one it is compiled on.
    """
    if platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2 and head_dim <= 128:
        return "cudnn"
    return "splash" if platform == "tpu" and head_dim % LANES == 0 else "xla"


def check_implementation(implementation: str) -> str:
    """Return `implementation` if it is a known name.

    Raises:
        ValueError: names the known ones.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is unknown: expected one of {', '.join(IMPLEMENTATIONS)}.")
    return implementation


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str = "xla") -> jax.Array:
    """softmax(q kᵀ / √D) v, unmasked, with the softmax in float32 whatever the inputs' type.

    Args:
        q: [B, S, H, D] queries.
        k: [B, T, H, D] keys.
        v: [B, T, H, D] values.
        implementation: one of `IMPLEMENTATIONS`; "splash" needs T = S.

    Returns:
        [B, S, H, D] in the type of `q`.

    Raises:
        ValueError: if `implementation` is unknown.
    """
    if check_implementation(implementation) != "splash":
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    if not axis_sizes():
        return splash(q, k, v)
    # The compiler cannot divide a kernel that it does not know: each device is given its records and heads.
    spec = P(batch_axes(len(q)), None, TENSOR, None)
    return jax.shard_map(splash, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`attention` by JAX's TPU kernel (FlashAttention-2, Dao 2307.08691); q, k, v [B, S, H, D] of one device.

    The sequence is padded to a multiple of 128; what is padded is another segment, which nothing else attends to.
    """
    length, heads, dim = q.shape[1:]
    padded = -(-length // LANES) * LANES
    block = max(size for size in range(LANES, min(LARGEST_BLOCK, padded) + 1, LANES) if padded % size == 0)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.FullMask((padded, padded))] * heads),
        block_sizes=splash_attention.BlockSizes(
            **dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block)
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    segment = (jnp.arange(padded) >= length).astype(jnp.int32)
    segments = splash_attention.SegmentIds(q=segment, kv=segment)
    out = jax.vmap(partial(kernel, segment_ids=segments))(by_head(q * dim**-0.5), by_head(k), by_head(v))
    return out.swapaxes(1, 2)[:, :length].astype(q.dtype)


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
