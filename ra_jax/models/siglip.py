"""Image tokens of a reference image: SigLIP's vision transformer, then FLUX.1-Redux's embedder.

SigLIP (arXiv:2303.15343) matches transformers' `SiglipVisionModel` up to `last_hidden_state`. Its blocks are stacked
on a leading axis and run by `jax.lax.scan`. The embedder matches diffusers' `ReduxImageEncoder`. Images have channels
last.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from PIL import Image

from ra_jax.errors import WeightError
from ra_jax.models.attention import attention
from ra_jax.models.config_json import check_settings
from ra_jax.models.initializers import draw_with_xla, lecun_normal
from ra_jax.parallel.partitioning import gather_params, shard_batch

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the vision transformer, with the keys and defaults of transformers' config.json.

    Raises:
        ValueError: if `num_attention_heads` does not divide `hidden_size`, `image_size` or `patch_size` is not an
            integer, or `hidden_act` is unknown.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}: expected a divisor of hidden_size, "
                f"{self.hidden_size}."
            )
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one integer, the side of a square.")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}: expected one of {', '.join(ACTIVATIONS)}.")

    @property
    def num_tokens(self) -> int:
        """Number of patches of an image. Pixels at the right and lower edge that do not fill a patch are ignored."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> "SiglipConfig":
        """Read transformers' config.json of a vision model, or of a whole SigLIP model (key `vision_config`).

        All other keys are ignored, such as the keys for the text model and for training.
        """
        values = config_json.get("vision_config", config_json)
        known = [field.name for field in dataclasses.fields(cls)]
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of transformers' config.json for a `SiglipVisionModel` without its pooling head."""
        return {
            "architectures": ["SiglipVisionModel"],
            "model_type": "siglip_vision_model",
            "attention_dropout": 0.0,
            "vision_use_head": False,
            **dataclasses.asdict(self),
        }


@dataclasses.dataclass(frozen=True)
class ReduxConfig:
    """Widths of the embedder, with the keys and defaults of diffusers' `image_embedder/config.json`."""

    redux_dim: int = 1152
    txt_in_features: int = 4096

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> "ReduxConfig":
        """Read diffusers' config.json; keys that begin with "_" are ignored.

        Raises:
            ValueError: for an unknown key.
        """
        return cls(**check_settings(config_json, [field.name for field in dataclasses.fields(cls)], "image_embedder"))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of diffusers' config.json."""
        return {"_class_name": "ReduxImageEncoder", **dataclasses.asdict(self)}


class SelfAttention(nnx.Module):
    """Multi-head attention in which every patch attends to every patch: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: SiglipConfig, *, linear: Callable):
        dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (linear(dim, dim) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (project(x).reshape(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v).reshape(x.shape))


class MLP(nnx.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: SiglipConfig, *, linear: Callable):
        self.fc1 = linear(config.hidden_size, config.intermediate_size)
        self.fc2 = linear(config.intermediate_size, config.hidden_size)
        self.activation = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: SiglipConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, kernel_init=lecun_normal, rngs=rngs)
        self.layer_norm1, self.layer_norm2 = (
            _layer_norm(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs) for _ in range(2)
        )
        self.self_attn = SelfAttention(config, linear=linear)
        self.mlp = MLP(config, linear=linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def _layer_norm(config: SiglipConfig, **options) -> nnx.LayerNorm:
    # The fast variance, E x² - (E x)², loses all digits if a channel's mean is large, as in trained SigLIPs.
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, **options)


class SiglipVision(nnx.Module):
    """SigLIP's vision transformer, without the pooling head.

    Args:
        config: sizes.
        dtype: dtype of matmuls. The statistics of norms and the softmax are always float32.
        param_dtype: dtype of stored parameters.
        rngs: keys of the initial values.
    """

    def __init__(
        self,
        config: SiglipConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        patch = (config.patch_size, config.patch_size)
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.patch_embedding = nnx.Conv(
            config.num_channels,
            config.hidden_size,
            patch,
            strides=patch,
            padding="VALID",
            kernel_init=lecun_normal,
            rngs=rngs,
            **dtypes,
        )
        draw_positions = draw_with_xla(nnx.initializers.normal(config.hidden_size**-0.5))
        self.position_embedding = nnx.Param(
            draw_positions(rngs.params(), (config.num_tokens, config.hidden_size), param_dtype)
        )
        make_block = nnx.vmap(lambda rngs: Block(config, rngs=rngs, **dtypes))
        self.layers = make_block(rngs.split(config.num_hidden_layers))
        self.post_layernorm = _layer_norm(config, rngs=rngs, **dtypes)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Compute the last hidden state [B, num_tokens, hidden_size] float32 of preprocessed pixels [B, s, s, 3].

        Raises:
            ValueError: if s is not `config.image_size`.
        """
        config = self.config
        if pixels.shape[1:] != (config.image_size, config.image_size, config.num_channels):
            raise ValueError(
                f"pixels have shape {pixels.shape}: expected [B, {config.image_size}, {config.image_size}, "
                f"{config.num_channels}]; use feature_extractor/ and image_encoder/ of the same model."
            )
        patches = self.patch_embedding(pixels.astype(self.dtype))
        x = patches.reshape(pixels.shape[0], config.num_tokens, config.hidden_size)
        x = x + self.position_embedding[...].astype(self.dtype)
        graphdef, params = nnx.split(self.layers)
        x, _ = jax.lax.scan(
            lambda x, layer: (nnx.merge(graphdef, gather_params(layer))(shard_batch(x)), None), x, params
        )
        return self.post_layernorm(x).astype(jnp.float32)


class ReduxEmbedder(nnx.Module):
    """redux_down(silu(redux_up(x))): [B, T, redux_dim] -> [B, T, txt_in_features] float32."""

    def __init__(
        self,
        config: ReduxConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, kernel_init=lecun_normal, rngs=rngs)
        self.config = config
        self.redux_up = linear(config.redux_dim, 3 * config.txt_in_features)
        self.redux_down = linear(3 * config.txt_in_features, config.txt_in_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.redux_down(nnx.silu(self.redux_up(x))).astype(jnp.float32)


class Redux(nnx.Module):
    """FLUX.1-Redux: encodes preprocessed pixels into tokens of the transformer's context.

    Args:
        vision: sizes of SigLIP.
        embedder: widths of the embedder.
        dtype: as in `SiglipVision`.
        param_dtype: as in `SiglipVision`.
        rngs: as in `SiglipVision`.

    Raises:
        ValueError: if SigLIP's `hidden_size` is not the embedder's `redux_dim`.
    """

    def __init__(
        self,
        vision: SiglipConfig,
        embedder: ReduxConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if vision.hidden_size != embedder.redux_dim:
            raise ValueError(
                f"redux_dim is {embedder.redux_dim}: expected the image encoder's hidden_size, "
                f"{vision.hidden_size}; use image_encoder/ and image_embedder/ of the same model."
            )
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.vision = SiglipVision(vision, **options)
        self.embedder = ReduxEmbedder(embedder, **options)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Compute image tokens [B, T, txt_in_features] float32 from preprocessed pixels [B, s, s, 3]."""
        return self.embedder(self.vision(pixels))


def preprocess(folder: str | Path) -> Callable[[Image.Image], np.ndarray]:
    """Return the function that preprocesses images for the Redux model in `folder`.

    `folder/feature_extractor/preprocessor_config.json` defines how images are resized and normalized (FLUX.1-Redux:
    384 px, bicubic, [-1, 1]).

    Returns:
        a function from an image of any size and mode to pixels [s, s, 3] float32.

    Raises:
        WeightError: if preprocessor_config.json does not exist.
    """
    # transformers is imported here, because the import takes seconds and only this function needs it. The environment
    # variable suppresses the warning of transformers that PyTorch is missing. This code does not need PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import SiglipImageProcessorPil

    config = Path(folder) / "feature_extractor" / "preprocessor_config.json"
    if not config.is_file():
        raise WeightError(
            f"{config} does not exist: expected a folder of FLUX.1-Redux in diffusers' layout "
            "(feature_extractor/, image_encoder/, image_embedder/)."
        )
    processor = SiglipImageProcessorPil.from_pretrained(config.parent)

    def to_pixels(image: Image.Image) -> np.ndarray:
        batch = processor.preprocess(image, do_resize=True, do_convert_rgb=True, return_tensors="np")
        return np.ascontiguousarray(batch["pixel_values"][0].transpose(1, 2, 0), np.float32)

    return to_pixels
