"""Attention, with kernels for CPUs, GPUs and TPUs, and rotary position embeddings."""

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
    """Rotary position embedding of a sequence, or of part of a sequence.

    Attributes:
        cos: cosines of the angles [S, head_dim / 2].
        sin: sines of the angles [S, head_dim / 2].
        tokens: number of tokens in the whole sequence, without padding. The padding is at the end, and no token attends
            to it.
        in_one_pass: whether `rotate` uses the formulation that is fastest on GPUs.
    """

    cos: jax.Array
    sin: jax.Array
    tokens: int = field(metadata={"static": True})
    in_one_pass: bool = field(default=False, metadata={"static": True})


# xla      XLA's own fusion, on every platform
# cudnn    the cuDNN kernel for NVIDIA GPUs (16-bit dtypes, head_dim <= 128)
# splash   the Pallas kernel for TPUs (head_dim a multiple of 128)
# by_head  a few heads at a time, so that their scores fit into a CPU's cache
IMPLEMENTATIONS = ("xla", "cudnn", "splash", "by_head")
HEADS_PER_ITERATION = 4  # heads that `by_head` computes per iteration of its loop
LANES = 128  # length of a TPU's vector; `splash` pads sequences to a multiple of it
LARGEST_BLOCK = 512  # largest block of queries or keys in `splash`
# The model pads its sequence once, to a multiple of this length. Otherwise every layer would pad for the kernel and for
# the matrix products. cuDNN's gradient needs even lengths, and tensor cores need multiples of 8.
MULTIPLES = {"cudnn": 8, "splash": LANES}
# `jax.checkpoint` policies save arrays by name. This name marks the arrays that the gradient of attention needs besides
# q, k and v.
ATTENTION_RESIDUALS = "attention"


def implementation_for(platform: str, *, dtype: jax.typing.DTypeLike, head_dim: int, devices: int = 1) -> str:
    """Return the fastest of `IMPLEMENTATIONS` that supports the platform, dtype and head size.

    Args:
        platform: platform that will run the program: "cpu", "gpu" (or "cuda") or "tpu". The program may be compiled on
            another platform.
        dtype: of queries, keys and values.
        head_dim: features of a head.
        devices: number of devices in the mesh.
    """
    if platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2 and head_dim <= 128:
        return "cudnn"
    if platform == "cpu":
        # On a mesh, the heads may be sharded. A loop over heads would then gather all heads on every device.
        return "by_head" if devices == 1 else "xla"
    return "splash" if platform == "tpu" and head_dim % LANES == 0 else "xla"


def check_implementation(implementation: str) -> str:
    """Return `implementation` if it is one of `IMPLEMENTATIONS`.

    Raises:
        ValueError: if it is not; the message lists the known names.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is unknown: expected one of {', '.join(IMPLEMENTATIONS)}.")
    return implementation


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str = "xla", tokens: int | None = None
) -> jax.Array:
    """Compute softmax(q kᵀ / √D) v; the softmax is float32 for inputs of any dtype.

    Args:
        q: [B, S, H, D] queries.
        k: [B, T, H, D] keys.
        v: [B, T, H, D] values.
        implementation: one of `IMPLEMENTATIONS`; "splash" needs T = S.
        tokens: only the first `tokens` keys are attended to; None: all keys.

    Returns:
        [B, S, H, D] in the dtype of `q`.

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
    # XLA cannot partition a custom kernel. shard_map therefore calls the kernel on each device's shard of records and
    # heads.
    spec = P(batch_axes(len(q)), None, TENSOR, None)
    return jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, *, tokens: int | None = None, implementation: str = "cudnn"
) -> jax.Array:
    """Compute `attention` with cuDNN's kernel for NVIDIA GPUs.

    Sequences of odd length are padded by one token, because JAX refuses to differentiate this kernel at odd lengths.
    """
    length, tokens = q.shape[1], k.shape[1] if tokens is None else tokens
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    key_lengths = None if tokens == k.shape[1] else jnp.full(len(k), tokens, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=key_lengths, implementation=implementation)
    return out[:, :length]


@jax.custom_vjp
def by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Compute `attention` a few heads at a time, so that the scores [S, T] of only these heads are in memory.

    No scores are saved for the gradient. The forward pass saves the log-sum-exp of each row of scores. The backward
    pass recomputes the softmax from q, k and the log-sum-exp (FlashAttention, Dao et al. 2205.14135, without tiles).

    The backward pass uses the transposed scores [T, S], because XLA's CPU compiler is slow at matrix products whose
    first factor has to be transposed.

    Four heads are computed side by side, because the small products of one head do not keep all cores busy.
    """
    return _by_head_forward(q, k, v)[0]


def _by_head_forward(q: jax.Array, k: jax.Array, v: jax.Array):
    def one_head(arrays):
        q, k, v = arrays
        scores = q @ k.T
        maximum = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - maximum)
        total = weights.sum(-1, keepdims=True)
        return (weights @ v) / total, (maximum + jnp.log(total))[:, 0]

    heads = _split_heads(q) * q.shape[-1] ** -0.5, _split_heads(k), _split_heads(v)
    out, log_total = checkpoint_name(_map_heads(one_head, heads), ATTENTION_RESIDUALS)
    return _merge_heads(out, len(q), q.dtype), (*heads, out, log_total)


def _by_head_backward(residuals, gradient: jax.Array):
    *heads, out, log_total = residuals
    batch, dtype, dim = len(gradient), gradient.dtype, gradient.shape[-1]

    def one_head(arrays):
        q, k, v, gradient, log_total, gradient_dot_out = arrays
        weights = jnp.exp(k @ q.T - log_total)  # [T, S]; d_x below is the gradient of x
        d_scores = weights * (v @ gradient.T - gradient_dot_out)
        # The gradient of q is d_scoresᵀ k = (kᵀ d_scores)ᵀ. The second form transposes k, which is small. Without the
        # barrier XLA rewrites it into the first form, which transposes d_scores [T, S].
        d_q = jax.lax.optimization_barrier(k.T @ d_scores).T
        return d_q, d_scores @ q, weights @ gradient

    gradient = _split_heads(gradient)
    d_q, d_k, d_v = _map_heads(one_head, (*heads, gradient, log_total, (gradient * out).sum(-1)))
    return tuple(_merge_heads(x, batch, dtype) for x in (d_q * dim**-0.5, d_k, d_v))


by_head.defvjp(_by_head_forward, _by_head_backward)


def _map_heads(function: Callable[[Any], Any], heads: Any) -> Any:
    """Apply `function` to each head, like `jax.lax.map`, but with `HEADS_PER_ITERATION` heads per iteration."""
    count = len(heads[0])
    return jax.lax.scan(lambda _, head: (None, function(head)), None, heads, unroll=min(HEADS_PER_ITERATION, count))[1]


def _split_heads(x: jax.Array) -> jax.Array:
    """Move heads to the first axis: [B, S, H, D] -> [B·H, S, D] in float32."""
    return x.astype(jnp.float32).swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _merge_heads(x: jax.Array, batch: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Move heads back: [B·H, S, D] -> [B, S, H, D] in `dtype`."""
    return x.reshape(batch, -1, *x.shape[1:]).swapaxes(1, 2).astype(dtype)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, *, tokens: int | None = None, interpret: bool = False
) -> jax.Array:
    """Compute `attention` with JAX's TPU kernel on one device (FlashAttention-2, Dao 2307.08691).

    q, k and v are [B, S, H, D]. The sequence is padded to a multiple of 128. The padding has a different segment id, so
    that no token attends to it.
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

    def pad_heads(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    segment = (jnp.arange(padded) >= (length if tokens is None else tokens)).astype(jnp.int32)
    segments = splash_attention.SegmentIds(q=segment, kv=segment)
    out = jax.vmap(partial(kernel, segment_ids=segments))(pad_heads(q * dim**-0.5), pad_heads(k), pad_heads(v))
    return out.swapaxes(1, 2)[:, :length].astype(q.dtype)


def rope_table(grid: tuple[int, int], context_tokens: int, axes_dims: tuple[int, ...], *, multiple: int = 1) -> Rope:
    """Compute rotary positions in float64, as diffusers' `FluxPosEmbed` does, and return them in float32.

    Args:
        grid: rows and columns of image tokens. They come first; the token in row r and column c has position (0, r, c).
        context_tokens: number of context tokens after the image, all at position (0, 0, 0).
        axes_dims: number of features of a head that each of the three position axes rotates.
        multiple: the sequence is padded to a multiple of this length. The padding has position (0, 0, 0).
    """
    rows, cols = grid
    tokens = rows * cols + context_tokens
    ids = np.zeros((tokens + -tokens % multiple, 3))
    ids[: rows * cols, 1] = np.repeat(np.arange(rows), cols)
    ids[: rows * cols, 2] = np.tile(np.arange(cols), rows)
    frequencies = [ROPE_THETA ** (-np.arange(0, dim, 2) / dim) for dim in axes_dims]
    angles = np.concatenate([np.outer(ids[:, axis], f) for axis, f in enumerate(frequencies)], axis=1)
    return Rope(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32), tokens)


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotate each pair of neighboring features of x [B, S, H, D] by the angle of its position."""
    if rope.in_one_pass:
        # Reversing each pair gives every feature its partner. This is fastest on GPUs. It is slow on TPUs, because each
        # pair would be written to memory in a vector of 128 elements.
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        cos, sin = (table[None, :, None, :, None] for table in (rope.cos, rope.sin))
        signs = jnp.asarray([-1.0, 1.0], jnp.float32)
        return (pairs * cos + pairs[..., ::-1] * (sin * signs)).reshape(x.shape)
    cos, sin = (table[None, :, None, :] for table in (rope.cos, rope.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
