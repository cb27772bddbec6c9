"""FLUX's image autoencoder: diffusers' AutoencoderKL, channels last.

Module and parameter names are diffusers' (`encoder.down_blocks.0.resnets.1.conv1`). Architecture: latent
diffusion's KL autoencoder (arXiv:2112.10752, appendix G).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ra_jax.models.config_json import known_values
from ra_jax.models.initializers import lecun_normal

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers clips the posterior's log-variance to it before any use

# Pixels attend to each other with scores [B, N, N], made this many queries at a time: a 1024x2048 diptych has
# N = 32,768 and its scores would take 4 GiB an image.
QUERY_CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The autoencoder's geometry, as in diffusers' `vae/config.json`; the defaults are diffusers'.

    `block_out_channels` has one width a resolution, each half the one before; `scaling_factor` and
    `shift_factor` normalise latents.

    Raises:
        ValueError: if there is no width, or `norm_num_groups` does not divide one.
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
        """Pixels a side of one latent cell."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> "VAEConfig":
        """Read diffusers' config.json; keys that begin with "_" are information only.

        Raises:
            ValueError: for a key that is not known, or a block or activation that FLUX's VAE does not have.
        """
        fixed = _fixed_values(len(config_json.get("block_out_channels", cls.block_out_channels)))
        known = [field.name for field in dataclasses.fields(cls)]
        values = known_values(config_json, [*known, *fixed], "vae")
        for key, value in fixed.items():
            if values.get(key, value) != value:
                raise ValueError(f"vae config: {key} is {values[key]!r}, only {value!r} is known.")
        # A null shift_factor (autoencoders before FLUX's) is no shift.
        values["shift_factor"] = values.get("shift_factor") or 0.0
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """The content of diffusers' config.json."""
        values = dataclasses.asdict(self) | {"block_out_channels": list(self.block_out_channels)}
        return {"_class_name": "AutoencoderKL", **values, **_fixed_values(len(self.block_out_channels))}


def _fixed_values(levels: int) -> dict[str, Any]:
    """What diffusers' config.json may say but FLUX's VAE has only one value for."""
    return {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latents_mean": None,
        "latents_std": None,
    }


class GroupNorm(nnx.Module):
    """(x - E x)/√(Var x + 1e-6)·scale + bias, over an image's pixels and a group of channels, in float32."""

    def __init__(self, channels: int, groups: int, *, param_dtype: DTypeLike):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        # Pixels first, the group's few members after: channels stay the inner axis, which on CPU makes a
        # training step a fifth faster than reducing [B, H·W, groups, members] at once.
        mean = self._mean(y)
        inverse = jax.lax.rsqrt(self._mean(jnp.square(y - mean)) + NORM_EPS)
        y = (y - mean) * (inverse * self.scale[...].astype(jnp.float32)) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)

    def _mean(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 1, 1, C], each channel carrying its group's mean."""
        by_channel = x.mean((1, 2)).reshape(x.shape[0], self.groups, -1)
        by_group = jnp.broadcast_to(by_channel.mean(-1, keepdims=True), by_channel.shape)
        return by_group.reshape(x.shape[0], 1, 1, x.shape[-1])


class _Layers:
    """Makes one network's layers in its dtypes: kernels lecun-normal, biases zero."""

    def __init__(self, config: VAEConfig, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self._common = {"dtype": dtype, "param_dtype": param_dtype, "kernel_init": lecun_normal, "rngs": rngs}

    def conv(self, inputs: int, outputs: int, size: int = 3, *, strides: int = 1, padding="SAME") -> nnx.Conv:
        return nnx.Conv(inputs, outputs, (size, size), strides=strides, padding=padding, **self._common)

    def linear(self, inputs: int, outputs: int) -> nnx.Linear:
        return nnx.Linear(inputs, outputs, **self._common)

    def norm(self, channels: int) -> GroupNorm:
        return GroupNorm(channels, self.config.norm_num_groups, param_dtype=self._common["param_dtype"])


class ResnetBlock(nnx.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1 conv on x where the width changes."""

    def __init__(self, inputs: int, outputs: int, make: _Layers):
        self.norm1 = make.norm(inputs)
        self.conv1 = make.conv(inputs, outputs)
        self.norm2 = make.norm(outputs)
        self.conv2 = make.conv(outputs, outputs)
        self.conv_shortcut = make.conv(inputs, outputs, 1) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(nnx.Module):
    """x + to_out(softmax(q kᵀ/√C) v): one head over all pixels of the image."""

    def __init__(self, channels: int, make: _Layers):
        self.group_norm = make.norm(channels)
        self.to_q = make.linear(channels, channels)
        self.to_k = make.linear(channels, channels)
        self.to_v = make.linear(channels, channels)
        self.to_out = nnx.List([make.linear(channels, channels)])

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, c)
        y = attend(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y).reshape(b, h, w, c)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(q kᵀ/√C) v, each [B, N, C]; scores and softmax in float32, QUERY_CHUNK queries at a time."""
    scale = query.shape[-1] ** -0.5

    @jax.checkpoint
    def one_query(query: jax.Array) -> jax.Array:  # [B, C], one pixel of each image
        scores = jnp.einsum("bc,bnc->bn", query, key, preferred_element_type=jnp.float32) * scale
        return jnp.einsum("bn,bnc->bc", jax.nn.softmax(scores).astype(value.dtype), value)

    return jax.lax.map(one_query, query.swapaxes(0, 1), batch_size=QUERY_CHUNK).swapaxes(0, 1)


class MidBlock(nnx.Module):
    """resnet, attention (optional), resnet at the lowest resolution."""

    def __init__(self, channels: int, make: _Layers):
        self.resnets = nnx.List([ResnetBlock(channels, channels, make) for _ in range(2)])
        attention = make.config.mid_block_add_attention
        self.attentions = nnx.List([PixelAttention(channels, make)] if attention else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nnx.Module):
    """Stride-2 conv, the image padded below and on the right only, as the original implementation pads it."""

    def __init__(self, channels: int, make: _Layers):
        self.conv = make.conv(channels, channels, strides=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Each pixel doubled both ways (nearest), then a conv."""

    def __init__(self, channels: int, make: _Layers):
        self.conv = make.conv(channels, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return self.conv(doubled.reshape(b, 2 * h, 2 * w, c))


class DownBlock(nnx.Module):
    """`layers_per_block` resnets and, but for the last block, a halving of the resolution."""

    def __init__(self, inputs: int, outputs: int, last: bool, make: _Layers):
        widths = [inputs] + [outputs] * (make.config.layers_per_block - 1)
        self.resnets = nnx.List([ResnetBlock(width, outputs, make) for width in widths])
        self.downsamplers = nnx.List([] if last else [Downsample(outputs, make)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    """`layers_per_block` + 1 resnets and, but for the last block, a doubling of the resolution."""

    def __init__(self, inputs: int, outputs: int, last: bool, make: _Layers):
        widths = [inputs] + [outputs] * make.config.layers_per_block
        self.resnets = nnx.List([ResnetBlock(width, outputs, make) for width in widths])
        self.upsamplers = nnx.List([] if last else [Upsample(outputs, make)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def _blocks(kind: type[DownBlock] | type[UpBlock], widths: tuple[int, ...], make: _Layers) -> nnx.List:
    """One block a resolution, in the order of `widths`."""
    inputs = (widths[0], *widths[:-1])
    last = len(widths) - 1
    return nnx.List([kind(i, o, n == last, make) for n, (i, o) in enumerate(zip(inputs, widths, strict=True))])


class Encoder(nnx.Module):
    """[B, H, W, in_channels] -> [B, H/f, W/f, 2·latent_channels]."""

    def __init__(self, make: _Layers):
        config, widths = make.config, make.config.block_out_channels
        self.conv_in = make.conv(config.in_channels, widths[0])
        self.down_blocks = _blocks(DownBlock, widths, make)
        self.mid_block = MidBlock(widths[-1], make)
        self.conv_norm_out = make.norm(widths[-1])
        self.conv_out = make.conv(widths[-1], 2 * config.latent_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """[B, h, w, latent_channels] -> [B, f·h, f·w, out_channels]."""

    def __init__(self, make: _Layers):
        config, widths = make.config, make.config.block_out_channels[::-1]
        self.conv_in = make.conv(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], make)
        self.up_blocks = _blocks(UpBlock, widths, make)
        self.conv_norm_out = make.norm(widths[-1])
        self.conv_out = make.conv(widths[-1], config.out_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Images in [-1, 1] to latents and back, both differentiable; a fresh model is ready to be trained.

    Args:
        config: geometry.
        dtype: in which convolutions run; the statistics of norms and attention stay float32.
        param_dtype: in which parameters are stored.
        rngs: first values: kernels lecun-normal, biases zero, norms the identity.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        make = _Layers(config, dtype, param_dtype, rngs)
        channels = config.latent_channels
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.encoder = Encoder(make)
        self.decoder = Decoder(make)
        self.quant_conv = make.conv(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = make.conv(channels, channels, 1) if config.use_post_quant_conv else None

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, 3] in [-1, 1] -> mean and log-variance of the posterior, before `normalise`.

        Returns:
            two arrays [B, H/f, W/f, C] float32, f = `config.factor`; the log-variance clipped to [-30, 20].

        Raises:
            ValueError: if the shape is another, or f does not divide H and W.
        """
        _check("images", images, self.config.in_channels, self.config.factor)
        moments = self.encoder(images.astype(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, C] after `denormalise` -> images [B, f·h, f·w, 3] around [-1, 1], not clipped.

        Raises:
            ValueError: if the shape is another.
        """
        _check("latents", latents, self.config.latent_channels, 1)
        latents = latents.astype(self.dtype)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def normalize(self, latents: jax.Array) -> jax.Array:
        """z -> (z - shift_factor)·scaling_factor, of about unit variance: what the transformer works on."""
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """The inverse of `normalise`: z/scaling_factor + shift_factor."""
        return latents / self.config.scaling_factor + self.config.shift_factor


def _check(name: str, x: jax.Array, channels: int, multiple: int) -> None:
    if x.ndim != 4 or x.shape[3] != channels or x.shape[1] % multiple or x.shape[2] % multiple:
        sides = f", H and W multiples of {multiple}" if multiple > 1 else ""
        raise ValueError(f"{name} have shape {x.shape}: expected [B, H, W, {channels}]{sides}.")
