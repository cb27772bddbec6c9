"""FLUX's image autoencoder: diffusers' AutoencoderKL, with channels last.

Module and parameter names match diffusers (`encoder.down_blocks.0.resnets.1.conv1`). The architecture is the KL
autoencoder of latent diffusion (arXiv:2112.10752, appendix G).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ra_jax.models.config_json import check_settings
from ra_jax.models.initializers import lecun_normal

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers clips the posterior's log-variance to this range before any use

# Attention computes its scores [B, N, N] for this many queries at a time. A 1024x2048 diptych has N = 32,768, and all
# scores at once would take 4 GiB per image.
QUERY_CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder, with the keys and defaults of diffusers' `vae/config.json`.

    `block_out_channels` has one width per resolution. Each resolution is half the previous one. `scaling_factor` and
    `shift_factor` normalize latents.

    Raises:
        ValueError: if `block_out_channels` is empty, or `norm_num_groups` does not divide each of its widths.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        widths = tuple(self.block_out_channels)
        object.__setattr__(self, "block_out_channels", widths)
        if not widths or any(width % self.norm_num_groups for width in widths):
            raise ValueError(
                f"block_out_channels is {list(widths)}: expected one or more multiples of norm_num_groups, "
                f"{self.norm_num_groups}."
            )

    @property
    def factor(self) -> int:
        """f, the number of pixels per latent cell along a side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> "VAEConfig":
        """Read diffusers' config.json; keys that begin with "_" are ignored.

        Raises:
            ValueError: for an unknown key, or for a block type, an activation or latent statistics that differ from
                FLUX's VAE.
        """
        fixed_values = _fixed_values(len(config_json.get("block_out_channels", cls.block_out_channels)))
        names = [field.name for field in dataclasses.fields(cls)]
        values = check_settings(config_json, [*names, *fixed_values], "vae")
        for key, value in fixed_values.items():
            if values.get(key, value) != value:
                raise ValueError(f"vae config: {key} is {values[key]!r}, but only {value!r} is supported.")
        # Autoencoders older than FLUX's have a null shift_factor, which means no shift.
        values["shift_factor"] = values.get("shift_factor") or 0.0
        return cls(**{key: value for key, value in values.items() if key in names})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of diffusers' config.json."""
        values = dataclasses.asdict(self) | {"block_out_channels": list(self.block_out_channels)}
        return {"_class_name": "AutoencoderKL", **values, **_fixed_values(len(self.block_out_channels))}


def _fixed_values(levels: int) -> dict[str, Any]:
    """Return the settings of diffusers' config.json for which FLUX's VAE supports only one value."""
    return {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latents_mean": None,
        "latents_std": None,
    }


class GroupNorm(nnx.Module):
    """(x - E x)/√(Var x + 1e-6)·scale + bias in float32. E and Var are over an image's pixels and a channel group."""

    def __init__(self, channels: int, groups: int, *, param_dtype: DTypeLike):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        # Means are over pixels first and over the group's few channels second, so that channels stay the inner axis. On
        # CPU, a training step is a fifth faster than with one reduction of [B, H·W, groups, channels per group].
        mean = self._group_mean(y)
        inverse_std = jax.lax.rsqrt(self._group_mean(jnp.square(y - mean)) + NORM_EPS)
        y = (y - mean) * (inverse_std * self.scale[...].astype(jnp.float32)) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)

    def _group_mean(self, x: jax.Array) -> jax.Array:
        """Compute the mean of each channel's group: [B, H, W, C] -> [B, 1, 1, C]."""
        by_channel = x.mean((1, 2)).reshape(x.shape[0], self.groups, -1)
        by_group = jnp.broadcast_to(by_channel.mean(-1, keepdims=True), by_channel.shape)
        return by_group.reshape(x.shape[0], 1, 1, x.shape[-1])


class _LayerFactory:
    """Makes the layers of one network with the same dtypes, lecun-normal kernels and zero biases."""

    def __init__(self, config: VAEConfig, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self._options = {"dtype": dtype, "param_dtype": param_dtype, "kernel_init": lecun_normal, "rngs": rngs}

    def conv(self, inputs: int, outputs: int, size: int = 3, *, strides: int = 1, padding="SAME") -> nnx.Conv:
        return nnx.Conv(inputs, outputs, (size, size), strides=strides, padding=padding, **self._options)

    def linear(self, inputs: int, outputs: int) -> nnx.Linear:
        return nnx.Linear(inputs, outputs, **self._options)

    def norm(self, channels: int) -> GroupNorm:
        return GroupNorm(channels, self.config.norm_num_groups, param_dtype=self._options["param_dtype"])


class ResnetBlock(nnx.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1 conv on x if the width changes."""

    def __init__(self, inputs: int, outputs: int, layers: _LayerFactory):
        self.norm1 = layers.norm(inputs)
        self.conv1 = layers.conv(inputs, outputs)
        self.norm2 = layers.norm(outputs)
        self.conv2 = layers.conv(outputs, outputs)
        self.conv_shortcut = layers.conv(inputs, outputs, 1) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(nnx.Module):
    """x + to_out(softmax(q kᵀ/√C) v), with one head over all pixels of the image."""

    def __init__(self, channels: int, layers: _LayerFactory):
        self.group_norm = layers.norm(channels)
        self.to_q = layers.linear(channels, channels)
        self.to_k = layers.linear(channels, channels)
        self.to_v = layers.linear(channels, channels)
        self.to_out = nnx.List([layers.linear(channels, channels)])

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, c)
        y = attend(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y).reshape(b, h, w, c)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Compute softmax(q kᵀ/√C) v for `QUERY_CHUNK` queries at a time.

    q, k, v and the result are [B, N, C]. Scores and softmax are float32.
    """
    scale = query.shape[-1] ** -0.5

    @jax.checkpoint
    def attend_one_query(query: jax.Array) -> jax.Array:  # [B, C], one pixel of each image
        scores = jnp.einsum("bc,bnc->bn", query, key, preferred_element_type=jnp.float32) * scale
        return jnp.einsum("bn,bnc->bc", jax.nn.softmax(scores).astype(value.dtype), value)

    return jax.lax.map(attend_one_query, query.swapaxes(0, 1), batch_size=QUERY_CHUNK).swapaxes(0, 1)


class MidBlock(nnx.Module):
    """A resnet, attention (optional) and another resnet at the lowest resolution."""

    def __init__(self, channels: int, layers: _LayerFactory):
        self.resnets = nnx.List([ResnetBlock(channels, channels, layers) for _ in range(2)])
        attention = layers.config.mid_block_add_attention
        self.attentions = nnx.List([PixelAttention(channels, layers)] if attention else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nnx.Module):
    """Stride-2 conv with padding only below and on the right of the image, as in the original implementation."""

    def __init__(self, channels: int, layers: _LayerFactory):
        self.conv = layers.conv(channels, channels, strides=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbor upsampling by 2 along both sides, then a conv."""

    def __init__(self, channels: int, layers: _LayerFactory):
        self.conv = layers.conv(channels, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return self.conv(doubled.reshape(b, 2 * h, 2 * w, c))


class DownBlock(nnx.Module):
    """`layers_per_block` resnets, then a layer that halves the resolution. The last block has no such layer."""

    def __init__(self, inputs: int, outputs: int, last: bool, layers: _LayerFactory):
        widths = [inputs] + [outputs] * (layers.config.layers_per_block - 1)
        self.resnets = nnx.List([ResnetBlock(width, outputs, layers) for width in widths])
        self.downsamplers = nnx.List([] if last else [Downsample(outputs, layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    """`layers_per_block` + 1 resnets, then a layer that doubles the resolution. The last block has no such layer."""

    def __init__(self, inputs: int, outputs: int, last: bool, layers: _LayerFactory):
        widths = [inputs] + [outputs] * layers.config.layers_per_block
        self.resnets = nnx.List([ResnetBlock(width, outputs, layers) for width in widths])
        self.upsamplers = nnx.List([] if last else [Upsample(outputs, layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def _make_blocks(block: type[DownBlock] | type[UpBlock], widths: tuple[int, ...], layers: _LayerFactory) -> nnx.List:
    """Make one block per resolution, in the order of `widths`."""
    input_widths = (widths[0], *widths[:-1])
    last = len(widths) - 1
    pairs = enumerate(zip(input_widths, widths, strict=True))
    return nnx.List([block(inputs, outputs, index == last, layers) for index, (inputs, outputs) in pairs])


class Encoder(nnx.Module):
    """Image [B, H, W, in_channels] -> moments of the posterior [B, H/f, W/f, 2·latent_channels]."""

    def __init__(self, layers: _LayerFactory):
        config, widths = layers.config, layers.config.block_out_channels
        self.conv_in = layers.conv(config.in_channels, widths[0])
        self.down_blocks = _make_blocks(DownBlock, widths, layers)
        self.mid_block = MidBlock(widths[-1], layers)
        self.conv_norm_out = layers.norm(widths[-1])
        self.conv_out = layers.conv(widths[-1], 2 * config.latent_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents [B, h, w, latent_channels] -> image [B, f·h, f·w, out_channels]."""

    def __init__(self, layers: _LayerFactory):
        config, widths = layers.config, layers.config.block_out_channels[::-1]
        self.conv_in = layers.conv(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], layers)
        self.up_blocks = _make_blocks(UpBlock, widths, layers)
        self.conv_norm_out = layers.norm(widths[-1])
        self.conv_out = layers.conv(widths[-1], config.out_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Encodes images in [-1, 1] into latents and decodes latents; both are differentiable.

    Args:
        config: sizes.
        dtype: dtype of convolutions and linear layers. The statistics of norms, and the scores and softmax of
            attention, are always float32.
        param_dtype: dtype of stored parameters.
        rngs: keys of the initial values. A new model can be trained: kernels are lecun-normal, biases are 0, and the
            scales of norms are 1.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        layers = _LayerFactory(config, dtype, param_dtype, rngs)
        channels = config.latent_channels
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.encoder = Encoder(layers)
        self.decoder = Decoder(layers)
        self.quant_conv = layers.conv(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = layers.conv(channels, channels, 1) if config.use_post_quant_conv else None

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encode images [B, H, W, 3] in [-1, 1] to mean and log-variance of the posterior, before `normalize`.

        Returns:
            two arrays [B, H/f, W/f, C] float32 with f = `config.factor`. The log-variance is clipped to [-30, 20].

        Raises:
            ValueError: if `images` does not have this shape, or f does not divide H and W.
        """
        _check_shape("images", images, self.config.in_channels, self.config.factor)
        moments = self.encoder(images.astype(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decode latents [B, h, w, C], after `denormalize`, into images [B, f·h, f·w, 3] in [-1, 1], not clipped.

        Raises:
            ValueError: if `latents` does not have this shape.
        """
        _check_shape("latents", latents, self.config.latent_channels, 1)
        latents = latents.astype(self.dtype)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def normalize(self, latents: jax.Array) -> jax.Array:
        """Compute (z - shift_factor)·scaling_factor: latents of about unit variance, as the transformer expects."""
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """Invert `normalize`: z/scaling_factor + shift_factor."""
        return latents / self.config.scaling_factor + self.config.shift_factor


def _check_shape(name: str, x: jax.Array, channels: int, multiple: int) -> None:
    if x.ndim != 4 or x.shape[3] != channels or x.shape[1] % multiple or x.shape[2] % multiple:
        sides = f", H and W multiples of {multiple}" if multiple > 1 else ""
        raise ValueError(f"{name} have shape {x.shape}: expected [B, H, W, {channels}]{sides}.")
