"""A FillModel with its weights from diffusers' folders: transformer, VAE, Redux, fresh experts and router."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from PIL import Image

from ra_jax.interop.diffusers import load_flux, load_redux, load_vae
from ra_jax.interop.hub import fingerprint, resolve
from ra_jax.models.fill_model import FillModel, Weights, assemble
from ra_jax.models.flux import FluxConfig
from ra_jax.models.lora import LoRAConfig
from ra_jax.models.router import Router, RouterConfig
from ra_jax.models.siglip import Redux, preprocess
from ra_jax.models.vae import AutoencoderKL
from ra_jax.parallel.partitioning import Placement

FILL_PARTS = ("transformer", "vae", "scheduler")
ENCODER_PARTS = ("vae",)
REDUX_PARTS = ("image_encoder", "image_embedder", "feature_extractor")


@dataclass(frozen=True)
class LoadedModel:
    """A model and its weights. folder: the Fill folder on disk; preprocess: a reference picture -> Redux pixels
    [s, s, 3], None without Redux; image_tokens: Redux tokens an image; fingerprint: of the base's files."""

    model: FillModel
    trainable: Weights
    frozen: Weights
    flux_config: FluxConfig
    folder: Path
    preprocess: Callable[[Image.Image], np.ndarray] | None
    image_tokens: int
    fingerprint: str


@dataclass(frozen=True)
class LoadedEncoders:
    """VAE and Redux alone; `preprocess` as in `LoadedModel`; their fingerprint."""

    vae: AutoencoderKL
    redux: Redux
    preprocess: Callable[[Image.Image], np.ndarray]
    fingerprint: str


def load_encoders(fill: str, redux: str, *, dtype: DTypeLike) -> LoadedEncoders:
    """The encoders of `load_fill_model`, without the transformer. Raises WeightError as it does."""
    redux_folder = resolve(redux, REDUX_PARTS)
    return LoadedEncoders(
        vae=load_vae(resolve(fill, ENCODER_PARTS)),
        redux=load_redux(redux_folder, dtype=dtype, param_dtype=dtype),
        preprocess=preprocess(redux_folder),
        fingerprint=encoders_fingerprint(fill, redux),
    )


def encoders_fingerprint(fill: str, redux: str) -> str:
    """Changes when the weights of VAE or Redux do. Raises WeightError for weights that cannot be had."""
    return fingerprint(resolve(fill, ENCODER_PARTS), ENCODER_PARTS) + fingerprint(resolve(redux, REDUX_PARTS))


def load_fill_model(
    fill: str,
    redux: str | None,
    *,
    lora: LoRAConfig | None,
    router: RouterConfig | None,
    dtype: DTypeLike = jnp.float32,
    text_tokens: int = 512,
    remat: str = "none",
    train_base: bool = False,
    int8: bool = False,
    seed: int = 0,
    placement: Placement | None = None,
) -> LoadedModel:
    """Load FLUX.1-Fill (`fill`) and FLUX.1-Redux (`redux`, None: no image tokens), folders or hub ids.

    The base is stored in `dtype`, or in float32 where it is to be trained (`train_base`); with `int8` its blocks'
    kernels in 8 bits. Matmuls run in `dtype`; the VAE stays float32. All live where `placement` says (None: on the
    default device). Experts (`lora`) and `router` come together or not at all; their first values derive from `seed`.
    Raises WeightError for weights that cannot be had or do not fit, ValueError for one of `lora` and `router` alone.
    """
    if (lora is None) != (router is None):
        raise ValueError(f"lora is {lora} and router {router}: expected both, or None twice for no experts")
    folder = resolve(fill, FILL_PARTS)
    rngs = nnx.Rngs(seed)
    flux = load_flux(
        folder,
        dtype=dtype,
        param_dtype=jnp.float32 if train_base else dtype,
        lora=lora,
        int8=int8,
        remat=remat,
        rngs=rngs,
        placement=placement,
    )
    vae = load_vae(folder, placement=placement)
    redux_folder = None if redux is None else resolve(redux, REDUX_PARTS)
    embedder = (
        None if redux_folder is None else load_redux(redux_folder, dtype=dtype, param_dtype=dtype, placement=placement)
    )
    experts = None if router is None else Router(router, 4 * vae.config.latent_channels, rngs)
    model, trainable, frozen = assemble(flux, vae, embedder, experts, text_tokens=text_tokens, train_base=train_base)
    if placement is not None:  # the router was made where nobody asked
        trainable, frozen = jax.device_put((trainable, frozen), placement.shardings((trainable, frozen)))
    return LoadedModel(
        model=model,
        trainable=trainable,
        frozen=frozen if placement is not None else jax.device_put(frozen),
        flux_config=flux.config,
        folder=folder,
        preprocess=None if redux_folder is None else preprocess(redux_folder),
        image_tokens=0 if embedder is None else embedder.vision.config.num_tokens,
        fingerprint=fingerprint(folder) if redux_folder is None else fingerprint(folder) + fingerprint(redux_folder),
    )
