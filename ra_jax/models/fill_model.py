"""FLUX.1-Fill with experts, as pure functions of arrays.

`FillModel` is the static part: graph definitions and sizes. It is hashable, and compiled functions close over it.
Its methods take the arrays as two pytrees:

    trainable  {"flux": LoRA parameters (or the whole transformer), "router": router parameters}
    frozen     {"flux": the rest of the transformer, "vae": …, "redux": …}

In training, `frozen` may also have "reference": the weights that the run started with, in the form of `trainable`.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ra_jax.errors import WeightError
from ra_jax.models.conditioning import Condition, context_tokens, pack, pack_mask, token_mask, unpack
from ra_jax.models.flux import Flux
from ra_jax.models.lora import Adapter
from ra_jax.models.router import Router, router_features
from ra_jax.models.siglip import Redux
from ra_jax.models.vae import AutoencoderKL
from ra_jax.parallel.partitioning import gather_params, shard_batch

Weights = dict[str, Any]


@dataclass(frozen=True)
class FillModel:
    """The static part of a FLUX.1-Fill model. Its methods take the weights as arguments.

    Attributes:
        flux: graph definition of the transformer.
        vae: graph definition of the autoencoder.
        redux: graph definition of the encoder of reference images; None without image tokens.
        router: graph definition of the experts' router; None without experts.
        factor: f, pixels per latent cell along a side.
        latent_features: 4C, features of a packed latent token.
        joint_dim: features of a context token.
        pooled_dim: P, features of the pooled text embedding.
        text_tokens: length of the empty prompt.
        num_experts: E; 0 without experts.
        initial_gates: E gates, which a new router gives to every image; empty without experts.
    """

    flux: nnx.GraphDef = field(repr=False)
    vae: nnx.GraphDef = field(repr=False)
    redux: nnx.GraphDef | None = field(repr=False)
    router: nnx.GraphDef | None = field(repr=False)
    factor: int
    latent_features: int
    joint_dim: int
    pooled_dim: int
    text_tokens: int
    num_experts: int
    initial_gates: tuple[float, ...]

    @property
    def size_multiple(self) -> int:
        """2f: both sides of an image, in pixels, must be multiples of this."""
        return 2 * self.factor

    def encode(self, frozen: Weights, image: jax.Array) -> jax.Array:
        """Encode an image [B, H, W, 3] in [0, 1] to the posterior mean, normalized and packed: [B, N, 4C] float32."""
        return encode_image(nnx.merge(self.vae, frozen["vae"]), image)

    def decode(self, frozen: Weights, latents: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Decode packed latents [B, N, 4C] into an image [B, H, W, 3] in [0, 1], not clipped."""
        vae = nnx.merge(self.vae, frozen["vae"])
        return (vae.decode(vae.denormalize(unpack(latents, grid))).astype(jnp.float32) + 1.0) / 2.0

    def image_tokens(self, frozen: Weights, pixels: jax.Array) -> jax.Array:
        """Compute Redux tokens [B, T, joint_dim] from preprocessed pixels [B, s, s, 3]."""
        return nnx.merge(self.redux, gather_params(frozen["redux"]))(pixels)

    def condition(
        self,
        frozen: Weights,
        image: jax.Array | None,
        mask: jax.Array,
        *,
        image_tokens: jax.Array | None = None,
        text: jax.Array | None = None,
        masked_latents: jax.Array | None = None,
    ) -> Condition:
        """Build the condition for filling `mask` in `image`.

        The masked pixels are set to gray (0 in [−1, 1]) before encoding, as in FluxFillPipeline.

        Args:
            frozen: frozen weights.
            image: [B, H, W, 3] in [0, 1]. It may be None if `masked_latents` is given, and is then not read.
            mask: [B, H, W], 1 = fill.
            image_tokens: Redux tokens [B, T, joint_dim]; None: no image tokens.
            text: prompt embeddings [B, S, joint_dim] in place of the empty prompt.
            masked_latents: encoding [B, N, 4C] of the masked image, if it has already been computed.

        Raises:
            ValueError: if H or W is not a multiple of `size_multiple`.
        """
        b, height, width = mask.shape
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"image of {height}x{width} pixels: both sides must be multiples of {self.size_multiple} "
                "(twice the VAE's factor); resize or pad the image"
            )
        if masked_latents is None:
            masked_latents = self.encode(frozen, apply_mask(image, mask))
        fill = jnp.concatenate([masked_latents, pack_mask(mask, self.factor)], axis=-1)
        context = context_tokens(
            image_tokens, batch=b, text_tokens=self.text_tokens, joint_dim=self.joint_dim, text=text
        )
        pooled = jnp.zeros((b, self.pooled_dim), jnp.float32)
        return Condition(fill, context, pooled, (height // self.size_multiple, width // self.size_multiple))

    def gates(
        self, trainable: Weights, condition: Condition, *, panel: slice | None = None
    ) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
        """Compute the router's gates [B, E], and the soft gates [B, E] for the diversity loss.

        The two differ only with `topk` routing. Both are None without experts.

        Args:
            trainable: trainable weights.
            condition: condition of B records.
            panel: token columns that the router reads; None: the right half, which is the photo of a diptych.
        """
        if self.router is None:
            return None, None
        return self.gates_from_features(trainable, self.router_features(condition, panel=panel))

    def router_features(self, condition: Condition, *, panel: slice | None = None) -> jax.Array:
        """Compute the router's input [B, F] from a condition, without any parameters; `panel` is as in `gates`."""
        columns = condition.grid[1]
        return router_features(
            condition.fill[..., : self.latent_features],
            token_mask(condition.fill, self.latent_features),
            condition.grid,
            panel_columns=slice(columns // 2, columns) if panel is None else panel,
        )

    def gates_from_features(self, trainable: Weights, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compute the same two arrays as `gates`, but from `router_features` [B, F]."""
        router = nnx.merge(self.router, trainable["router"])
        gates = router(features)
        return gates, router.probabilities(features) if router.config.routing == "topk" else gates

    def velocity(
        self,
        trainable: Weights,
        frozen: Weights,
        latents: jax.Array,
        t: jax.Array,
        condition: Condition,
        *,
        adapter: Adapter,
        guidance_scale: float,
    ) -> jax.Array:
        """Predict the velocity v_θ(x_t, t, c), [B, N, 4C] in float32.

        Args:
            trainable: trainable weights.
            frozen: frozen weights.
            latents: x_t, [B, N, 4C].
            t: [B] in (0, 1].
            condition: c.
            adapter: gates and dropout of the experts. Without gates the experts are off.
            guidance_scale: embedded guidance scale.
        """
        flux = nnx.merge(self.flux, *gather_params((trainable["flux"], frozen["flux"])))
        latents, condition = shard_batch((latents, condition))
        guidance = jnp.full(t.shape, guidance_scale, jnp.float32)
        return flux(latents, t, condition, guidance, adapter=adapter).astype(jnp.float32)


def encode_image(vae: AutoencoderKL, image: jax.Array) -> jax.Array:
    """Encode an image as `FillModel.encode` does, without the rest of the model."""
    mean, _ = vae.encode(2.0 * image - 1.0)
    return pack(vae.normalize(mean).astype(jnp.float32))


def apply_mask(image: jax.Array, mask: jax.Array) -> jax.Array:
    """Set the pixels of an image [B, H, W, 3] in [0, 1] to gray (0.5) inside `mask` [B, H, W]."""
    return 0.5 + (image - 0.5) * (1.0 - mask[..., None])


def assemble_model(
    flux: Flux,
    vae: AutoencoderKL,
    redux: Redux | None,
    router: Router | None,
    *,
    text_tokens: int,
    train_base: bool = False,
) -> tuple[FillModel, Weights, Weights]:
    """Split modules into (model, trainable, frozen).

    Args:
        flux: transformer, with experts unless `train_base`.
        vae: autoencoder.
        redux: encoder of reference images; None: no image tokens.
        router: router of the experts; None: no experts.
        text_tokens: length of the empty prompt.
        train_base: whether the whole transformer is trainable. If not, only its experts are. The router is always
            trainable.

    Raises:
        WeightError: if the channels of transformer and VAE do not match.
    """
    trainable_type = nnx.Param if train_base else nnx.LoRAParam
    flux_graph, flux_trainable, flux_frozen = nnx.split(flux, trainable_type, ...)
    vae_graph, vae_state = nnx.split(vae)
    trainable, frozen = {"flux": flux_trainable}, {"flux": flux_frozen, "vae": vae_state}
    redux_graph = router_graph = None
    if redux is not None:
        redux_graph, frozen["redux"] = nnx.split(redux)
    if router is not None:
        router_graph, trainable["router"] = nnx.split(router)
    config = flux.config
    channels = vae.config.latent_channels
    in_channels, out_channels = 8 * channels + 4 * vae.config.factor**2, 4 * channels
    if (config.in_channels, config.out_channels) != (in_channels, out_channels):
        raise WeightError(
            f"the transformer has {config.in_channels} input channels and {config.out_channels} output channels: a "
            f"Fill model with this VAE ({channels} latent channels, factor {vae.config.factor}) needs {in_channels} "
            f"and {out_channels}; load a FLUX.1-Fill transformer and the VAE of the same folder"
        )
    model = FillModel(
        flux=flux_graph,
        vae=vae_graph,
        redux=redux_graph,
        router=router_graph,
        factor=vae.config.factor,
        latent_features=4 * channels,
        joint_dim=config.joint_attention_dim,
        pooled_dim=config.pooled_projection_dim,
        text_tokens=text_tokens,
        num_experts=0 if router is None else router.config.num_experts,
        initial_gates=() if router is None else router.config.fixed_weights,
    )
    return model, trainable, frozen
