"""Attention behind one function, by the kernel of the chips that a program is compiled for; rotary positions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from ra_jax.parallel.partitioning import TENSOR, axis_sizes, batch_axes

ROPE_THETA = 10_000


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rope:
    """Rotary positions of a sequence or a part of it: cosines and sines [S, head_dim / 2]. The first `tokens` of the
    whole sequence are tokens; what follows is padding, which nothing attends to. in_one_pass: how to `rotate`."""

    cos: jax.Array
    sin: jax.Array
    tokens: int = field(metadata={"static": True})
    in_one_pass: bool = field(default=False, metadata={"static": True})


# xla: fused by the compiler, everywhere; cudnn: the kernel of NVIDIA cards (16 bits, head_dim <= 128); splash: the
# Pallas kernel of TPUs (head_dim a multiple of 128); by_head: a few heads after one another, for a CPU's cache.
IMPLEMENTATIONS = ("xla", "cudnn", "splash", "by_head")
HEADS_PER_CALL = 4  # of by_head
LANES = 128  # a TPU's vector: sequences are padded to a multiple of it
LARGEST_BLOCK = 512
# Sequences that a model pads to such a multiple, its kernel and matrix products need not pad in every layer: cuDNN's
# gradient wants even lengths, tensor cores multiples of 8.
MULTIPLES = {"cudnn": 8, "splash": LANES}
ATTENTION_RESIDUALS = "attention"  # names what attention's gradient needs beside q, k and v, for `jax.checkpoint`


def implementation_for(platform: str, *, dtype: jax.typing.DTypeLike, head_dim: int, devices: int = 1) -> str:
    """The fastest of `IMPLEMENTATIONS` on "cpu", "gpu" or "tpu", where it can compute such heads.

    platform: that the program will run on, which need not be the one it is compiled on; devices: of its mesh.
    """
    if platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2 and head_dim <= 128:
        return "cudnn"
    if platform == "cpu":
        return "by_head" if devices == 1 else "xla"  # a loop over heads that devices share would gather them all
    return "splash" if platform == "tpu" and head_dim % LANES == 0 else "xla"


def check_implementation(implementation: str) -> str:
    """Return `implementation` if it is a known name.

    Raises:
        ValueError: names the known ones.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is unknown: expected one of {', '.join(IMPLEMENTATIONS)}.")
    return implementation


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str = "xla", tokens: int | None = None
) -> jax.Array:
    """softmax(q kᵀ / √D) v with the softmax in float32 whatever the inputs' type.

    Args:
        q: [B, S, H, D] queries.
        k: [B, T, H, D] keys.
        v: [B, T, H, D] values.
        implementation: one of `IMPLEMENTATIONS`; "splash" needs T = S.
        tokens: only so many of the keys, the first, are attended to; None: all.

    Returns:
        [B, S, H, D] in the type of `q`.

    Raises:
        ValueError: if `implementation` is unknown.
    """
    check_implementation(implementation)
    if implementation in ("xla", "by_head"):
        k, v = k[:, :tokens], v[:, :tokens]
        if implementation == "by_head":
            return by_head(q, k, v)
        return checkpoint_name(jax.nn.dot_product_attention(q, k, v, implementation="xla"), ATTENTION_RESIDUALS)
    kernel = partial(splash if implementation == "splash" else cudnn, tokens=tokens)
    if not axis_sizes():
        return kernel(q, k, v)
    # The compiler cannot divide a kernel that it does not know: each device is given its records and heads.
    spec = P(batch_axes(len(q)), None, TENSOR, None)
    return jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, *, tokens: int | None = None, implementation: str = "cudnn"
) -> jax.Array:
    """`attention` by NVIDIA's kernel: a token is added to sequences of odd length, which JAX refuses for a gradient."""
    length, tokens = q.shape[1], k.shape[1] if tokens is None else tokens
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    attended = None if tokens == k.shape[1] else jnp.full(len(k), tokens, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=attended, implementation=implementation)
    return out[:, :length]


@jax.custom_vjp
def by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attention` with the scores [S, T] of a few heads in memory at a time, and none of them kept for the gradient.

    The gradient computes them again from the kept logarithm of each row's sum (FlashAttention, Dao et al. 2205.14135,
    without its tiles). It does so transposed, since XLA's CPU products are slow where the first factor has to be.
    Heads are taken four by four, each beside the others: small products by themselves do not keep all cores busy.
    """
    return _by_head_forward(q, k, v)[0]


def _by_head_forward(q: jax.Array, k: jax.Array, v: jax.Array):
    def head(given):
        q, k, v = given
        scores = q @ k.T
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        return (weights @ v) / total, (largest + jnp.log(total))[:, 0]

    heads = _heads(q) * q.shape[-1] ** -0.5, _heads(k), _heads(v)
    out, log_total = checkpoint_name(_map_heads(head, heads), ATTENTION_RESIDUALS)
    return _records(out, len(q), q.dtype), (*heads, out, log_total)


def _by_head_backward(saved, gradient: jax.Array):
    *heads, out, log_total = saved
    records, dtype, dim = len(gradient), gradient.dtype, gradient.shape[-1]

    def head(given):
        q, k, v, gradient, log_total, along = given
        weights = jnp.exp(k @ q.T - log_total)  # [T, S]
        by_scores = weights * (v @ gradient.T - along)
        by_q = jax.lax.optimization_barrier(k.T @ by_scores).T  # without it XLA makes by_scoresᵀ k of it again
        return by_q, by_scores @ q, weights @ gradient

    gradient = _heads(gradient)
    by_q, by_k, by_v = _map_heads(head, (*heads, gradient, log_total, (gradient * out).sum(-1)))
    return tuple(_records(x, records, dtype) for x in (by_q * dim**-0.5, by_k, by_v))


by_head.defvjp(_by_head_forward, _by_head_backward)


def _map_heads(function: Callable[[Any], Any], heads: Any) -> Any:
    """`jax.lax.map` of `HEADS_PER_CALL` turns of its loop in one."""
    count = len(heads[0])
    return jax.lax.scan(lambda _, head: (None, function(head)), None, heads, unroll=min(HEADS_PER_CALL, count))[1]


def _heads(x: jax.Array) -> jax.Array:
    """[B, S, H, D] -> [B·H, S, D] in float32."""
    return x.astype(jnp.float32).swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _records(x: jax.Array, records: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[B·H, S, D] -> [B, S, H, D]."""
    return x.reshape(records, -1, *x.shape[1:]).swapaxes(1, 2).astype(dtype)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, *, tokens: int | None = None, interpret: bool = False
) -> jax.Array:
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
        residual_checkpoint_name=ATTENTION_RESIDUALS,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def padded_heads(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    segment = (jnp.arange(padded) >= (length if tokens is None else tokens)).astype(jnp.int32)
    segments = splash_attention.SegmentIds(q=segment, kv=segment)
    out = jax.vmap(partial(kernel, segment_ids=segments))(padded_heads(q * dim**-0.5), padded_heads(k), padded_heads(v))
    return out.swapaxes(1, 2)[:, :length].astype(q.dtype)


def rope_table(grid: tuple[int, int], others: int, axes_dims: tuple[int, ...], *, multiple: int = 1) -> Rope:
    """Rotary positions, computed in float64 as diffusers' `FluxPosEmbed` does.

    The image token of row r and column c is at (0, r, c); after the image come `others`, context tokens at (0, 0, 0),
    and padding up to a `multiple`.
    """
    rows, cols = grid
    tokens = rows * cols + others
    ids = np.zeros((tokens + -tokens % multiple, 3))
    ids[: rows * cols, 1] = np.repeat(np.arange(rows), cols)
    ids[: rows * cols, 2] = np.tile(np.arange(cols), rows)
    frequencies = [ROPE_THETA ** (-np.arange(0, dim, 2) / dim) for dim in axes_dims]
    angles = np.concatenate([np.outer(ids[:, axis], f) for axis, f in enumerate(frequencies)], axis=1)
    return Rope(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32), tokens)


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotate each pair of neighbouring features of x [B, S, H, D] by its position's angle."""
    if rope.in_one_pass:
        # Each feature's partner is its neighbour, reversed within the pair: what GPUs do fastest. TPUs would keep the
        # pairs in memory, each in a vector of its own.
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        cos, sin = (table[None, :, None, :, None] for table in (rope.cos, rope.sin))
        signs = jnp.asarray([-1.0, 1.0], jnp.float32)
        return (pairs * cos + pairs[..., ::-1] * (sin * signs)).reshape(x.shape)
    cos, sin = (table[None, :, None, :] for table in (rope.cos, rope.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
