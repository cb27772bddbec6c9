"""The FLUX.1 transformer: double-stream blocks (separate image and context), then single-stream blocks.

Module and parameter names match diffusers' `FluxTransformer2DModel`, without block numbers. Blocks of the same
kind are stacked on a leading axis and run by one `jax.lax.scan`, so that compile time does not grow with depth.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ra_jax.models.attention import MULTIPLES, Rope, attention, check_implementation, rope_table, rotate
from ra_jax.models.blocks import REMAT_POLICIES, scan_blocks, stack_blocks
from ra_jax.models.conditioning import Condition
from ra_jax.models.config_json import check_settings
from ra_jax.models.lora import Adapter, ExpertLinear, LoRAConfig, attach_experts

TIME_SCALE = 1000.0  # t in (0, 1] and guidance are multiplied by it before they are embedded
SINUSOID_DIM = 256
NORM_EPS = 1e-6

Streams = tuple[jax.Array, jax.Array]  # image [B, N, D], context [B, S, D]


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX transformer, with the keys and defaults of diffusers' `transformer/config.json`.

    Raises:
        ValueError: if `axes_dims_rope` is not three even numbers whose sum is `attention_head_dim`.
    """

    in_channels: int = 64
    out_channels: int | None = None  # None: in_channels
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)

    def __post_init__(self):
        axes = tuple(self.axes_dims_rope)
        object.__setattr__(self, "axes_dims_rope", axes)
        object.__setattr__(self, "out_channels", self.out_channels or self.in_channels)
        if len(axes) != 3 or any(axis % 2 for axis in axes) or sum(axes) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope is {list(axes)}: expected three even numbers that add up to "
                f"attention_head_dim, {self.attention_head_dim}."
            )

    @property
    def inner_dim(self) -> int:
        """D, the number of features of a token in the blocks."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> "FluxConfig":
        """Read diffusers' config.json; keys that begin with "_" are ignored.

        Raises:
            ValueError: for an unknown key, or a `patch_size` other than 1.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        values = check_settings(config_json, [*names, "patch_size"], "transformer")
        if (patch_size := values.pop("patch_size", 1)) != 1:
            raise ValueError(
                f"transformer config: patch_size is {patch_size}, but only 1 is supported, since latents are packed "
                "before the transformer."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of diffusers' config.json."""
        values = dataclasses.asdict(self) | {"axes_dims_rope": list(self.axes_dims_rope)}
        return {"_class_name": "FluxTransformer2DModel", "patch_size": 1, **values}


def sinusoid(t: jax.Array) -> jax.Array:
    """Embed t [B] as [cos(1000·t·f), sin(1000·t·f)] with f_i = 10000^(-i/128), i < 128: [B, 256], float32."""
    half = SINUSOID_DIM // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    # t is converted to float32 before it is scaled: near 1000, bfloat16 represents only every fourth integer.
    angles = TIME_SCALE * t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Compute LayerNorm(x)·(1 + scale) + shift in float32: x [B, S, D], shift and scale [B, D] -> x's dtype."""
    x32 = x.astype(jnp.float32)
    mean = x32.mean(axis=-1, keepdims=True)
    variance = jnp.square(x32 - mean).mean(axis=-1, keepdims=True)
    normed = (x32 - mean) * jax.lax.rsqrt(variance + NORM_EPS)
    return (normed * (1 + scale.astype(jnp.float32)[:, None]) + shift.astype(jnp.float32)[:, None]).astype(x.dtype)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Compute GELU in its tanh form in float32 and return it in x's dtype.

    gelu(x) = x Φ(x) ≈ x (1 + tanh u)/2 with u = √(2/π) (x + 0.044715 x³).
    """
    return jax.nn.gelu(x.astype(jnp.float32)).astype(x.dtype)


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    # Uses σ(2u) = (1 + tanh u)/2. JAX's own gradient would keep the forward pass's tanh in memory and take two passes
    # over x.
    x32, c = x.astype(jnp.float32), math.sqrt(8 / math.pi)
    sigma = jax.nn.sigmoid(c * x32 * (1 + 0.044715 * x32**2))
    slope = sigma + x32 * sigma * (1 - sigma) * c * (1 + 3 * 0.044715 * x32**2)
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class RotaryNorm(nnx.Module):
    """RMSNorm over the last axis, x / rms(x) · scale, then rotary positions. It computes in float32."""

    def __init__(self, dim: int, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))

    def __call__(self, x: jax.Array, rope: Rope) -> jax.Array:
        """Normalize and rotate x [B, S, H, head_dim]. Returns x's shape and dtype."""
        x32 = x.astype(jnp.float32)
        norm = jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + NORM_EPS)
        # The rotation is linear, and the norm is one number per head, so the norm can be applied last. One pass then
        # reads x and writes the result, both in x's dtype.
        return (rotate(x32 * self.scale[...].astype(jnp.float32), rope) * norm).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class LayerFactory:
    """Makes the layers of one model with the same dtypes (see `FluxOptions`) and attention implementation."""

    dtype: DTypeLike
    param_dtype: DTypeLike
    attention: str
    int8: bool = False

    def linear(self, in_dim: int, out_dim: int, rngs: nnx.Rngs, **init: Any) -> ExpertLinear:
        """Make a linear layer [in] -> [out] that supports experts; `init`: more arguments of `ExpertLinear`."""
        param_dtype = jnp.int8 if self.int8 else self.param_dtype
        return ExpertLinear(in_dim, out_dim, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs, **init)

    def norm(self, dim: int) -> RotaryNorm:
        """Make the norm and rotation of queries or keys whose heads have `dim` features."""
        return RotaryNorm(dim, self.param_dtype)


class MLPEmbedder(nnx.Module):
    """linear_2(silu(linear_1(x)))."""

    def __init__(self, in_dim: int, dim: int, layers: LayerFactory, rngs: nnx.Rngs):
        self.linear_1 = layers.linear(in_dim, dim, rngs)
        self.linear_2 = layers.linear(dim, dim, rngs)

    def __call__(self, x: jax.Array, adapter: Adapter | None) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x, adapter)), adapter)


class TimeTextEmbed(nnx.Module):
    """Sum [B, D] of the embeddings of time, pooled text and guidance (if the model embeds it)."""

    def __init__(self, config: FluxConfig, layers: LayerFactory, rngs: nnx.Rngs):
        dim = config.inner_dim
        self.timestep_embedder = MLPEmbedder(SINUSOID_DIM, dim, layers, rngs)
        self.guidance_embedder = MLPEmbedder(SINUSOID_DIM, dim, layers, rngs) if config.guidance_embeds else None
        self.text_embedder = MLPEmbedder(config.pooled_projection_dim, dim, layers, rngs)

    def __call__(
        self, t: jax.Array, guidance: jax.Array | None, pooled: jax.Array, adapter: Adapter | None
    ) -> jax.Array:
        embedding = self.timestep_embedder(sinusoid(t), adapter) + self.text_embedder(pooled, adapter)
        if self.guidance_embedder is None:
            return embedding
        if guidance is None:
            raise ValueError("guidance is None, but this model embeds the guidance scale: pass an array [B].")
        return embedding + self.guidance_embedder(sinusoid(guidance), adapter)


class Modulation(nnx.Module):
    """SiLU and a linear layer: embedding [B, D] -> `count` vectors [B, D], which are initially zero."""

    def __init__(self, dim: int, count: int, layers: LayerFactory, rngs: nnx.Rngs):
        self.linear = layers.linear(dim, count * dim, rngs, kernel_init=nnx.initializers.zeros)
        self.count = count

    def __call__(self, embedding: jax.Array, adapter: Adapter | None) -> list[jax.Array]:
        return jnp.split(self.linear(jax.nn.silu(embedding), adapter), self.count, axis=-1)


class GELU(nnx.Module):
    """A linear layer and GELU (tanh form)."""

    def __init__(self, dim: int, hidden: int, layers: LayerFactory, rngs: nnx.Rngs):
        self.proj = layers.linear(dim, hidden, rngs)

    def __call__(self, x: jax.Array, adapter: Adapter | None) -> jax.Array:
        return gelu(self.proj(x, adapter))


class FeedForward(nnx.Module):
    """The MLP of a double-stream block. The keys of `net` are indices of the list in diffusers."""

    def __init__(self, dim: int, layers: LayerFactory, rngs: nnx.Rngs):
        self.net = nnx.Dict({"0": GELU(dim, 4 * dim, layers, rngs), "2": layers.linear(4 * dim, dim, rngs)})

    def __call__(self, x: jax.Array, adapter: Adapter | None) -> jax.Array:
        return self.net["2"](self.net["0"](x, adapter), adapter)


class SelfAttention(nnx.Module):
    """Attention of a single-stream block: [B, S, D] -> [B, S, D], without an output projection."""

    def __init__(self, config: FluxConfig, layers: LayerFactory, rngs: nnx.Rngs):
        dim, self.head_dim = config.inner_dim, config.attention_head_dim
        self.norm_q, self.norm_k = (layers.norm(self.head_dim) for _ in range(2))
        self.to_q, self.to_k, self.to_v = (layers.linear(dim, dim, rngs) for _ in range(3))
        self.implementation = layers.attention

    def __call__(self, x: jax.Array, rope: Rope, adapter: Adapter | None) -> jax.Array:
        return self.attend(*self.qkv(x, rope, adapter), rope.tokens)

    def qkv(self, x: jax.Array, rope: Rope, adapter: Adapter | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute queries and keys, normalized and rotated, and values: each [B, S, H, head_dim]."""
        q, k, v = (self.heads(linear(x, adapter)) for linear in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q, rope), self.norm_k(k, rope), v

    def heads(self, x: jax.Array) -> jax.Array:
        """Split features into heads: [B, S, D] -> [B, S, H, head_dim]."""
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, tokens: int) -> jax.Array:
        """Attend to the first `tokens` keys and join the heads: [B, S, D]."""
        out = attention(q, k, v, implementation=self.implementation, tokens=tokens)
        return out.reshape(*out.shape[:2], -1)


class JointAttention(SelfAttention):
    """Attention of a double-stream block: image and context have separate projections; each attends to both."""

    def __init__(self, config: FluxConfig, layers: LayerFactory, rngs: nnx.Rngs):
        super().__init__(config, layers, rngs)
        dim = config.inner_dim
        self.norm_added_q, self.norm_added_k = (layers.norm(self.head_dim) for _ in range(2))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (layers.linear(dim, dim, rngs) for _ in range(3))
        self.to_out = nnx.Dict({"0": layers.linear(dim, dim, rngs)})
        self.to_add_out = layers.linear(dim, dim, rngs)

    def __call__(
        self, x: jax.Array, context: jax.Array, rope: Rope, adapter: Adapter | None
    ) -> tuple[jax.Array, jax.Array]:
        """Attend from image x [B, N, D] and context [B, S, D] to both. Returns arrays of the same shapes."""
        length = x.shape[1]
        x_rope = jax.tree.map(lambda table: table[:length], rope)
        context_rope = jax.tree.map(lambda table: table[length:], rope)
        pairs = zip(self.qkv(x, x_rope, adapter), self.added_qkv(context, context_rope, adapter), strict=True)
        out = self.attend(*(jnp.concatenate(pair, axis=1) for pair in pairs), rope.tokens)
        return self.to_out["0"](out[:, :length], adapter), self.to_add_out(out[:, length:], adapter)

    def added_qkv(
        self, context: jax.Array, rope: Rope, adapter: Adapter | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute `qkv` of the context, with the context's projections."""
        linears = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (self.heads(linear(context, adapter)) for linear in linears)
        return self.norm_added_q(q, rope), self.norm_added_k(k, rope), v


class DoubleBlock(nnx.Module):
    """MM-DiT block: image and context have separate weights and share only the attention."""

    def __init__(self, config: FluxConfig, layers: LayerFactory, rngs: nnx.Rngs):
        dim = config.inner_dim
        self.norm1, self.norm1_context = (Modulation(dim, 6, layers, rngs) for _ in range(2))
        self.attn = JointAttention(config, layers, rngs)
        self.ff, self.ff_context = (FeedForward(dim, layers, rngs) for _ in range(2))

    def __call__(self, streams: Streams, embedding: jax.Array, rope: Rope, adapter: Adapter | None) -> Streams:
        """Apply the block to (image [B, N, D], context [B, S, D]). Returns arrays of the same shapes."""
        x, context = streams
        shift, scale, gate, *mlp = self.norm1(embedding, adapter)
        context_shift, context_scale, context_gate, *context_mlp = self.norm1_context(embedding, adapter)
        attended, context_attended = self.attn(
            modulate(x, shift, scale), modulate(context, context_shift, context_scale), rope, adapter
        )
        x = self._feed_forward(self.ff, x + gate[:, None] * attended, mlp, adapter)
        context = context + context_gate[:, None] * context_attended
        return x, self._feed_forward(self.ff_context, context, context_mlp, adapter)

    @staticmethod
    def _feed_forward(ff: FeedForward, x: jax.Array, modulation: list[jax.Array], adapter: Adapter | None) -> jax.Array:
        shift, scale, gate = modulation
        return x + gate[:, None] * ff(modulate(x, shift, scale), adapter)


class SingleBlock(nnx.Module):
    """Block with parallel attention and MLP over one sequence of image and context."""

    def __init__(self, config: FluxConfig, layers: LayerFactory, rngs: nnx.Rngs):
        dim = config.inner_dim
        self.norm = Modulation(dim, 3, layers, rngs)
        self.attn = SelfAttention(config, layers, rngs)
        self.proj_mlp = layers.linear(dim, 4 * dim, rngs)
        self.proj_out = layers.linear(5 * dim, dim, rngs)

    def __call__(self, x: jax.Array, embedding: jax.Array, rope: Rope, adapter: Adapter | None) -> jax.Array:
        """Apply the block to x [B, N + S, D]. Returns an array of the same shape."""
        shift, scale, gate = self.norm(embedding, adapter)
        normed = modulate(x, shift, scale)
        mlp = gelu(self.proj_mlp(normed, adapter))
        joined = jnp.concatenate([self.attn(normed, rope, adapter), mlp], axis=-1)
        return x + gate[:, None] * self.proj_out(joined, adapter)


@dataclasses.dataclass(frozen=True)
class FluxOptions:
    """How a transformer is stored, computed and differentiated. Its sizes are in `FluxConfig`.

    Attributes:
        dtype: dtype of matmuls. Time embeddings, rotary positions, norms and softmax are always float32.
        param_dtype: dtype of the stored base parameters. Experts are always float32.
        int8: whether the blocks' kernels are stored in 8 bits (`quantization.quantize`).
        remat: what is saved for the backward pass.
            "none": everything.
            "products": each block's input, its products with kernels and experts, and the output of attention.
            "blocks": each block's input, and the output of attention.
            "full": each block's input.

    Raises:
        ValueError: for an unknown `remat`.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    int8: bool = False
    remat: str = "none"

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat {self.remat!r} is unknown: expected one of {', '.join(REMAT_POLICIES)}.")


DEFAULT_OPTIONS = FluxOptions()  # float32, with everything saved for the backward pass


class Flux(nnx.Module):
    """FLUX.1 transformer, which predicts the velocity of packed latents.

    Args:
        config: sizes.
        options: dtypes and what is saved for the backward pass.
        attention: one of `attention.IMPLEMENTATIONS`.
        lora: experts on the linear layers that match its `target_modules`; None: no experts.
        rngs: keys of the initial values. Modulations and `proj_out` are initially zero, so a new model returns zeros.

    Raises:
        ValueError: if `attention` is unknown.
        TargetError: if `lora.target_modules` matches no layer.
    """

    def __init__(
        self,
        config: FluxConfig,
        options: FluxOptions = DEFAULT_OPTIONS,
        *,
        attention: str = "xla",
        lora: LoRAConfig | None = None,
        rngs: nnx.Rngs,
    ):
        self.config, self.remat, self.dtype = config, options.remat, jnp.dtype(options.dtype)
        self.sequence_multiple, self.on_gpu = MULTIPLES.get(attention, 1), attention == "cudnn"
        layers = LayerFactory(options.dtype, options.param_dtype, check_implementation(attention))
        # The embedding is computed in float32, because it is cheap and modulates every block.
        self.time_text_embed = TimeTextEmbed(config, dataclasses.replace(layers, dtype=jnp.float32), rngs)
        self.context_embedder = layers.linear(config.joint_attention_dim, config.inner_dim, rngs)
        self.x_embedder = layers.linear(config.in_channels, config.inner_dim, rngs)
        block_layers = dataclasses.replace(layers, int8=options.int8)
        self.transformer_blocks = stack_blocks(partial(DoubleBlock, config, block_layers), config.num_layers, rngs)
        self.single_transformer_blocks = stack_blocks(
            partial(SingleBlock, config, block_layers), config.num_single_layers, rngs
        )
        self.norm_out = Modulation(config.inner_dim, 2, layers, rngs)
        self.proj_out = layers.linear(config.inner_dim, config.out_channels, rngs, kernel_init=nnx.initializers.zeros)
        if lora is not None:
            attach_experts(self, lora, rngs.params())

    def __call__(
        self,
        latents: jax.Array,
        t: jax.Array,
        condition: Condition,
        guidance: jax.Array | None,
        *,
        adapter: Adapter | None = None,
    ) -> jax.Array:
        """Predict the velocity.

        Args:
            latents: [B, N, C] noisy packed latents, tokens row-major on the condition's grid.
            t: [B] in (0, 1], 1 = noise.
            condition: `fill` [B, N, in_channels - C], which is appended to the latents' features, `context`
                [B, S, joint_attention_dim], `pooled` [B, pooled_projection_dim], `grid` of N tokens.
            guidance: [B] guidance scale (such as 30). May be None if the model does not embed the guidance scale.
            adapter: gates and dropout of the experts; None switches the experts off.

        Returns:
            [B, N, out_channels] float32.

        Raises:
            ValueError: if shapes do not match `config`, or guidance is None but the model embeds it.
        """
        hidden, grid = jnp.concatenate([latents, condition.fill], axis=-1), condition.grid
        self._check_shapes(hidden, condition)
        adapter = None if adapter is None else adapter.per_example(hidden.shape[0])
        embedding = self.time_text_embed(t, guidance, condition.pooled, adapter)
        rope = rope_table(grid, condition.context.shape[1], self.config.axes_dims_rope, multiple=self.sequence_multiple)
        rope = dataclasses.replace(rope, in_one_pass=self.on_gpu)
        scan = partial(scan_blocks, embedding=embedding, rope=rope, adapter=adapter, remat=self.remat)

        x, context = self.x_embedder(hidden, adapter), self.context_embedder(condition.context, adapter)
        context = jnp.pad(context, ((0, 0), (0, len(rope.cos) - rope.tokens), (0, 0)))
        x, context = scan(self.transformer_blocks, (x, context))
        # Unlike in diffusers, the image comes first, so that the context's padding is at the end of the sequence.
        x = scan(self.single_transformer_blocks, jnp.concatenate([x, context], axis=1))[:, : hidden.shape[1]]
        scale, shift = self.norm_out(embedding, adapter)
        return self.proj_out(modulate(x, shift, scale), adapter).astype(jnp.float32)

    def _check_shapes(self, hidden: jax.Array, condition: Condition) -> None:
        config, batch, grid = self.config, hidden.shape[0], condition.grid
        expected = {
            "latents with fill": (hidden, (batch, grid[0] * grid[1], config.in_channels)),
            "context": (condition.context, (batch, condition.context.shape[1], config.joint_attention_dim)),
            "pooled": (condition.pooled, (batch, config.pooled_projection_dim)),
        }
        for name, (array, shape) in expected.items():
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}: expected {shape} for token grid {grid}.")
