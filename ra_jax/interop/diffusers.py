"""Models in and out of diffusers' folders: a whole Fill model with fresh experts, or module by module.

Folders are whole pipelines: FLUX.1-Fill (`transformer/`, `vae/`, `scheduler/`) or FLUX.1-Redux (`image_encoder/`,
`image_embedder/`, `feature_extractor/`), on disk or on the Hugging Face hub.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from PIL import Image

from ra_jax.errors import WeightError
from ra_jax.interop.diffusers_tables import FLUX, REDUX, SIGLIP, VAE
from ra_jax.interop.hub import fingerprint, resolve
from ra_jax.interop.transfer import Place, fill, store
from ra_jax.models.attention import implementation_for
from ra_jax.models.fill_model import FillModel, Weights, assemble_model
from ra_jax.models.flux import FLOAT32, Flux, FluxConfig, FluxOptions
from ra_jax.models.lora import LoRAConfig, attach_experts
from ra_jax.models.options import ModelOptions
from ra_jax.models.router import Router
from ra_jax.models.siglip import Redux, ReduxConfig, SiglipConfig, preprocess
from ra_jax.models.vae import AutoencoderKL, VAEConfig
from ra_jax.outputs import write_file
from ra_jax.parallel.partitioning import Placement

log = logging.getLogger(__name__)

FILL_PARTS = ("transformer", "vae", "scheduler")
ENCODER_PARTS = ("vae",)
REDUX_PARTS = ("image_encoder", "image_embedder", "feature_extractor")

FLUX_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}

FLUX_PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
}

SIGLIP_KINDS = ("siglip_vision_model", "siglip")


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
    fill: str, redux: str | None, options: ModelOptions, *, seed: int = 0, placement: Placement | None = None
) -> LoadedModel:
    """Load FLUX.1-Fill (`fill`) and FLUX.1-Redux (`redux`, None: no image tokens), folders or hub ids.

    The VAE stays float32. All live where `placement` says (None: on the default device). First values of experts and
    router derive from `seed`. Raises WeightError for weights that cannot be had or do not fit.
    """
    folder = resolve(fill, FILL_PARTS)
    rngs = nnx.Rngs(seed)
    flux = load_flux(folder, options.flux, lora=options.lora, rngs=rngs, placement=placement)
    vae = load_vae(folder, placement=placement)
    base, embedder, redux_folder = fingerprint(folder), None, None
    if redux is not None:
        redux_folder = resolve(redux, REDUX_PARTS)
        embedder = load_redux(redux_folder, dtype=options.dtype, param_dtype=options.dtype, placement=placement)
        base += fingerprint(redux_folder)
    router = None if options.router is None else Router(options.router, 4 * vae.config.latent_channels, rngs)
    model, trainable, frozen = assemble_model(
        flux, vae, embedder, router, text_tokens=options.text_tokens, train_base=options.train_base
    )
    if placement is None:
        frozen = jax.device_put(frozen)
    else:  # the router was made on the default device
        trainable, frozen = jax.device_put((trainable, frozen), placement.shardings((trainable, frozen)))
    return LoadedModel(
        model=model,
        trainable=trainable,
        frozen=frozen,
        flux_config=flux.config,
        folder=folder,
        preprocess=None if redux_folder is None else preprocess(redux_folder),
        image_tokens=0 if embedder is None else embedder.vision.config.num_tokens,
        fingerprint=base,
    )


def load_flux(
    folder: str | Path,
    options: FluxOptions = FLOAT32,
    *,
    attention: str | None = None,
    lora: LoRAConfig | None = None,
    rngs: nnx.Rngs | None = None,
    placement: Placement | None = None,
) -> Flux:
    """The transformer in `folder`/transformer, with fresh experts if `lora` is given.

    Args:
        folder: of the pipeline.
        options, lora: as in `Flux`; the files may be of any float type.
        attention: as in `Flux`; None: that of the devices here (`attention.implementation_for`).
        rngs: first values of the experts; needed with `lora` only.
        placement: where parameters are to live; None: on the default device. Files are read one parameter after
            another, and host memory never holds more than one of them.

    Raises:
        WeightError: with a full report, unless every tensor of the files fits one parameter and all are filled.
    """
    path, config = _read_config(folder, "transformer", FluxConfig, "FluxTransformer2DModel")
    if attention is None:
        devices = 1 if placement is None else placement.mesh.size
        attention = implementation_for(
            jax.default_backend(), dtype=options.dtype, head_dim=config.attention_head_dim, devices=devices
        )
        log.info("attention: %s", attention)
    if lora is not None and rngs is None:
        raise ValueError("rngs is None: expected nnx.Rngs, since lora asks for experts with first values.")
    base = nnx.eval_shape(lambda: Flux(config, options, attention=attention, rngs=nnx.Rngs(0)))
    flux = fill(base, path, FLUX, _place("flux", placement))
    if lora is None:
        return flux
    mixture = nnx.eval_shape(lambda: Flux(config, options, attention=attention, lora=lora, rngs=nnx.Rngs(0)))
    experts = _first_experts(base, lora, rngs.params(), placement)
    return nnx.merge(nnx.graphdef(mixture), experts, nnx.state(flux))


def _first_experts(base: Flux, lora: LoRAConfig, key: jax.Array, placement: Placement | None) -> nnx.State:
    """First values of the experts of an abstract base, made on the devices where they are to live."""
    graphdef, shapes = nnx.split(base)

    def experts(key: jax.Array) -> nnx.State:
        flux = nnx.merge(graphdef, shapes)
        attach_experts(flux, lora, key)
        return nnx.state(flux, nnx.LoRAParam)

    where = None if placement is None else placement.shardings({"flux": jax.eval_shape(experts, key)})["flux"]
    return jax.jit(experts, out_shardings=where)(key)


def load_vae(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    placement: Placement | None = None,
) -> AutoencoderKL:
    """The autoencoder in `folder`/vae; arguments and errors as in `load_flux`."""
    path, config = _read_config(folder, "vae", VAEConfig, "AutoencoderKL")
    options = {"dtype": dtype, "param_dtype": param_dtype}
    return fill(
        nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0), **options)), path, VAE, _place("vae", placement)
    )


def load_redux(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    placement: Placement | None = None,
) -> Redux:
    """SigLIP in `folder`/image_encoder and the embedder in `folder`/image_embedder; the rest as in `load_flux`."""
    vision_path, vision = _read_config(folder, "image_encoder", SiglipConfig, *SIGLIP_KINDS)
    embedder_path, embedder = _read_config(folder, "image_embedder", ReduxConfig, "ReduxImageEncoder")
    options = {"dtype": dtype, "param_dtype": param_dtype}
    try:
        redux = nnx.eval_shape(lambda: Redux(vision, embedder, rngs=nnx.Rngs(0), **options))
    except ValueError as error:
        raise WeightError(f"{folder}: {error}") from error
    redux.vision = fill(redux.vision, vision_path, SIGLIP, _place("redux/vision", placement))
    redux.embedder = fill(redux.embedder, embedder_path, REDUX, _place("redux/embedder", placement))
    return redux


def _place(part: str, placement: Placement | None) -> Place | None:
    """`Place` of the parameters of this part of the frozen weights."""
    return None if placement is None else lambda name, value: placement.put(f"{part}/{name}", value)


def read_configs(
    fill: str | Path, redux: str | Path | None
) -> tuple[FluxConfig, VAEConfig, SiglipConfig | None, ReduxConfig | None]:
    """The sizes of transformer, VAE, vision model and embedder, from the config.json of two folders; no weights."""
    _, flux = _read_config(fill, "transformer", FluxConfig, "FluxTransformer2DModel")
    _, vae = _read_config(fill, "vae", VAEConfig, "AutoencoderKL")
    return flux, vae, *((None, None) if redux is None else read_redux_configs(redux))


def read_redux_configs(redux: str | Path) -> tuple[SiglipConfig, ReduxConfig]:
    """The sizes of vision model and embedder, as `read_configs`."""
    _, vision = _read_config(redux, "image_encoder", SiglipConfig, *SIGLIP_KINDS)
    _, embedder = _read_config(redux, "image_embedder", ReduxConfig, "ReduxImageEncoder")
    return vision, embedder


def save_flux(flux: Flux, folder: str | Path) -> None:
    """Write the transformer without its experts to `folder`/transformer, as diffusers' from_pretrained reads it."""
    store(flux, flux.config.to_dict(), Path(folder) / "transformer", "diffusion_pytorch_model", FLUX)


def save_vae(vae: AutoencoderKL, folder: str | Path) -> None:
    """Write the autoencoder to `folder`/vae, as diffusers' from_pretrained reads it."""
    store(vae, vae.config.to_dict(), Path(folder) / "vae", "diffusion_pytorch_model", VAE)


def save_redux(redux: Redux, folder: str | Path) -> None:
    """Write `folder` as a FluxPriorReduxPipeline without text encoders.

    Writes image_encoder/, image_embedder/, feature_extractor/ (FLUX.1-Redux's preprocessing at this model's size)
    and model_index.json.
    """
    folder = Path(folder)
    size = redux.vision.config.image_size
    preprocessor = FLUX_PREPROCESSOR | {"size": {"height": size, "width": size}}
    store(redux.vision, redux.vision.config.to_dict(), folder / "image_encoder", "model", SIGLIP)
    embedder = folder / "image_embedder"
    store(redux.embedder, redux.embedder.config.to_dict(), embedder, "diffusion_pytorch_model", REDUX)
    _write_json(folder / "feature_extractor" / "preprocessor_config.json", preprocessor)
    _write_pipeline(
        folder,
        "FluxPriorReduxPipeline",
        image_encoder=("transformers", "SiglipVisionModel"),
        image_embedder=("diffusers", "ReduxImageEncoder"),
        feature_extractor=("transformers", "SiglipImageProcessor"),
    )


def save_fill_pipeline_config(folder: str | Path, scheduler: Mapping[str, Any] | None = None) -> None:
    """Make `folder`, where `save_flux` and `save_vae` wrote, a FluxFillPipeline without text encoders.

    Writes scheduler/scheduler_config.json and model_index.json.

    Args:
        folder: of the pipeline.
        scheduler: values that differ from FLUX.1-Fill-dev's (`FLUX_SCHEDULER`).

    Raises:
        ValueError: for a key of `scheduler` that FLUX's has not.
    """
    scheduler = dict(scheduler or {})
    if unknown := sorted(set(scheduler) - set(FLUX_SCHEDULER)):
        raise ValueError(f"scheduler has unknown keys {unknown}: expected some of {sorted(FLUX_SCHEDULER)}.")
    folder = Path(folder)
    _write_json(folder / "scheduler" / "scheduler_config.json", FLUX_SCHEDULER | scheduler)
    _write_pipeline(
        folder,
        "FluxFillPipeline",
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
        transformer=("diffusers", "FluxTransformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
    )


def _write_pipeline(folder: Path, name: str, **components: tuple[str, str]) -> None:
    text = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), (None, None))
    _write_json(folder / "model_index.json", {"_class_name": name, **components, **text})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(content, indent=2) + "\n")


def _read_config(folder: str | Path, component: str, config_type: Any, *kinds: str) -> tuple[Path, Any]:
    """A component's folder and its config.json as `config_type`; the file must say that it is one of `kinds`."""
    path = Path(folder) / component
    file = path / "config.json"
    if not file.is_file():
        raise WeightError(f"{file} does not exist: expected the folder of a pipeline in diffusers' layout.")
    try:
        content = json.loads(file.read_text())
        kind = content.get("_class_name", content.get("model_type"))
        if kind not in kinds:
            raise ValueError(f"it is of a {kind}, expected {' or '.join(kinds)}.")
        return path, config_type.from_dict(content)
    except ValueError as error:
        raise WeightError(f"{file}: {error}") from error
