"""Sizes of a Fill model, without weights. The sizes are enough to trace and compile programs."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ra_jax.models.fill_model import FillModel, Weights, assemble_model
from ra_jax.models.flux import Flux, FluxConfig
from ra_jax.models.options import ModelOptions
from ra_jax.models.router import Router
from ra_jax.models.siglip import Redux, ReduxConfig, SiglipConfig
from ra_jax.models.vae import AutoencoderKL, VAEConfig


@dataclass(frozen=True)
class FillGeometry:
    """Sizes of the networks of a Fill model.

    Attributes:
        flux: transformer.
        vae: autoencoder.
        vision: SigLIP, the first part of Redux; None without image tokens.
        embedder: the second part of Redux; None without image tokens.
    """

    flux: FluxConfig
    vae: VAEConfig
    vision: SiglipConfig | None
    embedder: ReduxConfig | None

    @property
    def image_tokens(self) -> int:
        """Number of Redux tokens per reference image; 0 without Redux."""
        return 0 if self.vision is None else self.vision.num_tokens


# Values of config.json in black-forest-labs/FLUX.1-Fill-dev and FLUX.1-Redux-dev (SigLIP so400m: images of 384 × 384
# pixels, patches of 14 × 14).
FLUX_FILL_DEV = FillGeometry(
    FluxConfig(in_channels=384, out_channels=64, guidance_embeds=True),
    VAEConfig(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    SiglipConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    ),
    ReduxConfig(),
)


def abstract_fill_model(
    geometry: FillGeometry, options: ModelOptions, *, attention: str
) -> tuple[FillModel, Weights, Weights]:
    """Build (model, trainable, frozen) as `interop.diffusers.load_fill_model` does, with shapes in place of arrays.

    Args:
        geometry: sizes of the networks.
        options: dtypes, experts and router.
        attention: implementation for the devices that run the program (`attention.implementation_for`).
    """
    dtype = options.dtype
    flux = partial(Flux, geometry.flux, options.flux, attention=attention, lora=options.lora)

    def build_networks() -> dict[str, nnx.Module]:
        networks = {"flux": flux(rngs=nnx.Rngs(0)), "vae": AutoencoderKL(geometry.vae, rngs=nnx.Rngs(0))}
        if geometry.vision is not None:
            redux = partial(Redux, geometry.vision, geometry.embedder, dtype=dtype, param_dtype=dtype)
            networks["redux"] = redux(rngs=nnx.Rngs(0))
        if options.router is not None:
            networks["router"] = Router(options.router, 4 * geometry.vae.latent_channels, nnx.Rngs(0))
        return networks

    networks = nnx.eval_shape(build_networks)
    ordered = [networks.get(name) for name in ("flux", "vae", "redux", "router")]
    return assemble_model(*ordered, text_tokens=options.text_tokens, train_base=options.train_base)


def random_weights(shapes: Any, key: jax.Array) -> Any:
    """Draw random arrays for a pytree of shapes, for benchmarks that need no real weights.

    Floating-point arrays with two or more dimensions are normal with a standard deviation of 1/√in, where in is the
    size of their second-to-last dimension. All other arrays are 1.
    """

    @partial(jax.jit, static_argnums=0)
    def draw(x: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if len(x.shape) < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.ones(x.shape, x.dtype)
        return jax.random.normal(key, x.shape, x.dtype) * x.shape[-2] ** -0.5

    leaves, treedef = jax.tree.flatten(shapes)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    return treedef.unflatten([draw(x, jax.random.fold_in(key, i)) for i, x in enumerate(shapes)])
