"""Load and save models in diffusers' folder layout: a whole Fill model with new experts, or single modules.

A folder holds a whole pipeline: FLUX.1-Fill (`transformer/`, `vae/`, `scheduler/`) or FLUX.1-Redux (`image_encoder/`,
`image_embedder/`, `feature_extractor/`). The folder is on disk, or on the Hugging Face hub.
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
from ra_jax.interop.diffusers_tables import FLUX_TABLE, REDUX_TABLE, SIGLIP_TABLE, VAE_TABLE
from ra_jax.interop.hub import fingerprint, resolve_folder
from ra_jax.interop.transfer import PutParameter, load_parameters, save_parameters
from ra_jax.models.attention import implementation_for
from ra_jax.models.fill_model import FillModel, Weights, assemble_model
from ra_jax.models.flux import DEFAULT_OPTIONS, Flux, FluxConfig, FluxOptions
from ra_jax.models.lora import LoRAConfig, attach_experts
from ra_jax.models.options import ModelOptions
from ra_jax.models.router import Router
from ra_jax.models.siglip import Redux, ReduxConfig, SiglipConfig, preprocess
from ra_jax.models.vae import AutoencoderKL, VAEConfig
from ra_jax.outputs import write_file
from ra_jax.parallel.partitioning import Placement

log = logging.getLogger(__name__)

FILL_SUBFOLDERS = ("transformer", "vae", "scheduler")
VAE_SUBFOLDERS = ("vae",)
REDUX_SUBFOLDERS = ("image_encoder", "image_embedder", "feature_extractor")

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

REDUX_PREPROCESSOR = {
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

SIGLIP_TYPES = ("siglip_vision_model", "siglip")


@dataclass(frozen=True)
class LoadedModel:
    """A model and its weights.

    Attributes:
        model: the model without its weights: graph definitions and sizes.
        trainable: the weights that training changes.
        frozen: all other weights.
        flux_config: sizes of the transformer.
        folder: the Fill folder on disk.
        preprocess: converts a reference image to the pixels [s, s, 3] that Redux encodes; None without Redux.
        image_tokens: number of Redux tokens per image; 0 without Redux.
        fingerprint: fingerprint of the Fill weights. With Redux, the fingerprint of the Redux weights is appended.
    """

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
    """The VAE and Redux, without the transformer.

    Attributes:
        vae: the autoencoder of FLUX.1-Fill.
        redux: the image encoder and embedder of FLUX.1-Redux.
        preprocess: as in `LoadedModel`.
        fingerprint: fingerprint of the weights of the VAE and Redux (`encoders_fingerprint`).
    """

    vae: AutoencoderKL
    redux: Redux
    preprocess: Callable[[Image.Image], np.ndarray]
    fingerprint: str


def load_encoders(fill: str, redux: str, *, dtype: DTypeLike) -> LoadedEncoders:
    """Load the VAE and Redux, without the transformer.

    Args:
        fill: folder or hub id of FLUX.1-Fill.
        redux: folder or hub id of FLUX.1-Redux.
        dtype: dtype in which Redux is stored and computed. The VAE is stored and computed in float32.

    Raises:
        WeightError: the weights could not be loaded, or do not match the model.
    """
    redux_folder = resolve_folder(redux, REDUX_SUBFOLDERS)
    return LoadedEncoders(
        vae=load_vae(resolve_folder(fill, VAE_SUBFOLDERS)),
        redux=load_redux(redux_folder, dtype=dtype, param_dtype=dtype),
        preprocess=preprocess(redux_folder),
        fingerprint=encoders_fingerprint(fill, redux),
    )


def encoders_fingerprint(fill: str, redux: str) -> str:
    """Return a fingerprint that changes when the weights of the VAE or of Redux change.

    Raises:
        WeightError: the weights could not be found or downloaded.
    """
    fill_folder, redux_folder = resolve_folder(fill, VAE_SUBFOLDERS), resolve_folder(redux, REDUX_SUBFOLDERS)
    return fingerprint(fill_folder, VAE_SUBFOLDERS) + fingerprint(redux_folder)


def load_fill_model(
    fill: str, redux: str | None, options: ModelOptions, *, seed: int = 0, placement: Placement | None = None
) -> LoadedModel:
    """Load FLUX.1-Fill and FLUX.1-Redux, and create the experts and the router that `options` describes.

    Args:
        fill: folder or hub id of FLUX.1-Fill.
        redux: folder or hub id of FLUX.1-Redux; None for a model without image tokens.
        options: dtypes, experts and router. The VAE is always float32.
        seed: seed of the initial values of experts and router.
        placement: how all weights are distributed over devices; None for the default device.

    Raises:
        WeightError: the weights could not be loaded, or do not match the model.
    """
    folder = resolve_folder(fill, FILL_SUBFOLDERS)
    rngs = nnx.Rngs(seed)
    flux = load_flux(folder, options.flux, lora=options.lora, rngs=rngs, placement=placement)
    vae = load_vae(folder, placement=placement)
    base_fingerprint, embedder, redux_folder = fingerprint(folder), None, None
    if redux is not None:
        redux_folder = resolve_folder(redux, REDUX_SUBFOLDERS)
        embedder = load_redux(redux_folder, dtype=options.dtype, param_dtype=options.dtype, placement=placement)
        base_fingerprint += fingerprint(redux_folder)
    router = None if options.router is None else Router(options.router, 4 * vae.config.latent_channels, rngs)
    model, trainable, frozen = assemble_model(
        flux, vae, embedder, router, text_tokens=options.text_tokens, train_base=options.train_base
    )
    if placement is None:
        frozen = jax.device_put(frozen)
    else:  # The router was created on the default device, so it has to be moved.
        trainable, frozen = jax.device_put((trainable, frozen), placement.shardings((trainable, frozen)))
    return LoadedModel(
        model=model,
        trainable=trainable,
        frozen=frozen,
        flux_config=flux.config,
        folder=folder,
        preprocess=None if redux_folder is None else preprocess(redux_folder),
        image_tokens=0 if embedder is None else embedder.vision.config.num_tokens,
        fingerprint=base_fingerprint,
    )


def load_flux(
    folder: str | Path,
    options: FluxOptions = DEFAULT_OPTIONS,
    *,
    attention: str | None = None,
    lora: LoRAConfig | None = None,
    rngs: nnx.Rngs | None = None,
    placement: Placement | None = None,
) -> Flux:
    """Load the transformer in `folder`/transformer; if `lora` is not None, also create experts.

    Parameters are read from the files one at a time, so that host memory holds at most one parameter.

    Args:
        folder: folder of the pipeline.
        options: as in `Flux`. The tensors in the files may have any float dtype.
        attention: as in `Flux`; None selects the implementation for this machine's devices
            (`attention.implementation_for`).
        lora: as in `Flux`.
        rngs: source of the experts' initial values; required with `lora`, otherwise unused.
        placement: how parameters are distributed over devices; None for the default device.

    Raises:
        WeightError: the files could not be read, or their tensors and the parameters do not match one to one in name
            and shape. The message lists the mismatches.
        ValueError: `lora` is not None, but `rngs` is.
    """
    path, config = _read_config(folder, "transformer", FluxConfig, "FluxTransformer2DModel")
    if attention is None:
        devices = 1 if placement is None else placement.mesh.size
        attention = implementation_for(
            jax.default_backend(), dtype=options.dtype, head_dim=config.attention_head_dim, devices=devices
        )
        log.info("attention implementation: %s", attention)
    if lora is not None and rngs is None:
        raise ValueError("rngs is None: expected nnx.Rngs, because lora adds experts that need initial values.")
    base = nnx.eval_shape(lambda: Flux(config, options, attention=attention, rngs=nnx.Rngs(0)))
    flux = load_parameters(base, path, FLUX_TABLE, _put_function("flux", placement))
    if lora is None:
        return flux
    with_experts = nnx.eval_shape(lambda: Flux(config, options, attention=attention, lora=lora, rngs=nnx.Rngs(0)))
    experts = _init_experts(base, lora, rngs.params(), placement)
    return nnx.merge(nnx.graphdef(with_experts), experts, nnx.state(flux))


def _init_experts(base: Flux, lora: LoRAConfig, key: jax.Array, placement: Placement | None) -> nnx.State:
    """Compute the initial values of the experts directly on the devices that `placement` assigns them to.

    `base` is abstract (`nnx.eval_shape`).
    """
    graphdef, shapes = nnx.split(base)

    def create_experts(key: jax.Array) -> nnx.State:
        flux = nnx.merge(graphdef, shapes)
        attach_experts(flux, lora, key)
        return nnx.state(flux, nnx.LoRAParam)

    shardings = None
    if placement is not None:
        shardings = placement.shardings({"flux": jax.eval_shape(create_experts, key)})["flux"]
    return jax.jit(create_experts, out_shardings=shardings)(key)


def load_vae(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    placement: Placement | None = None,
) -> AutoencoderKL:
    """Load the autoencoder in `folder`/vae.

    Args:
        folder: folder of the pipeline.
        dtype: dtype of the computation.
        param_dtype: dtype of the stored parameters.
        placement: as in `load_flux`.

    Raises:
        WeightError: as in `load_flux`.
    """
    path, config = _read_config(folder, "vae", VAEConfig, "AutoencoderKL")
    options = {"dtype": dtype, "param_dtype": param_dtype}
    vae = nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0), **options))
    return load_parameters(vae, path, VAE_TABLE, _put_function("vae", placement))


def load_redux(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    placement: Placement | None = None,
) -> Redux:
    """Load SigLIP from `folder`/image_encoder and the embedder from `folder`/image_embedder.

    Arguments and errors are as in `load_vae`. WeightError is also raised if SigLIP and the embedder have different
    widths.
    """
    vision_path, vision = _read_config(folder, "image_encoder", SiglipConfig, *SIGLIP_TYPES)
    embedder_path, embedder = _read_config(folder, "image_embedder", ReduxConfig, "ReduxImageEncoder")
    options = {"dtype": dtype, "param_dtype": param_dtype}
    try:
        redux = nnx.eval_shape(lambda: Redux(vision, embedder, rngs=nnx.Rngs(0), **options))
    except ValueError as error:
        raise WeightError(f"{folder}: {error}") from error
    put_vision, put_embedder = (_put_function(f"redux/{part}", placement) for part in ("vision", "embedder"))
    redux.vision = load_parameters(redux.vision, vision_path, SIGLIP_TABLE, put_vision)
    redux.embedder = load_parameters(redux.embedder, embedder_path, REDUX_TABLE, put_embedder)
    return redux


def _put_function(part: str, placement: Placement | None) -> PutParameter | None:
    """Return a function that puts parameters on the devices that `placement` assigns them to; None without a placement.

    `part` is the path of the module in the frozen weights, such as "redux/vision".
    """
    return None if placement is None else lambda name, value: placement.put(f"{part}/{name}", value)


def read_configs(
    fill: str | Path, redux: str | Path | None
) -> tuple[FluxConfig, VAEConfig, SiglipConfig | None, ReduxConfig | None]:
    """Read the sizes of transformer, VAE, SigLIP and Redux embedder from the config.json files, without weights.

    Args:
        fill: folder of FLUX.1-Fill.
        redux: folder of FLUX.1-Redux. If it is None, the results for SigLIP and the embedder are None.

    Raises:
        WeightError: a config.json is missing or invalid, or describes another kind of model.
    """
    _, flux = _read_config(fill, "transformer", FluxConfig, "FluxTransformer2DModel")
    _, vae = _read_config(fill, "vae", VAEConfig, "AutoencoderKL")
    return flux, vae, *((None, None) if redux is None else read_redux_configs(redux))


def read_redux_configs(redux: str | Path) -> tuple[SiglipConfig, ReduxConfig]:
    """Read the sizes of SigLIP and the Redux embedder, as `read_configs` does."""
    _, vision = _read_config(redux, "image_encoder", SiglipConfig, *SIGLIP_TYPES)
    _, embedder = _read_config(redux, "image_embedder", ReduxConfig, "ReduxImageEncoder")
    return vision, embedder


def save_flux(flux: Flux, folder: str | Path) -> None:
    """Write the transformer without its experts to `folder`/transformer, for diffusers' from_pretrained."""
    save_parameters(flux, flux.config.to_dict(), Path(folder) / "transformer", "diffusion_pytorch_model", FLUX_TABLE)


def save_vae(vae: AutoencoderKL, folder: str | Path) -> None:
    """Write the autoencoder to `folder`/vae, for diffusers' from_pretrained."""
    save_parameters(vae, vae.config.to_dict(), Path(folder) / "vae", "diffusion_pytorch_model", VAE_TABLE)


def save_redux(redux: Redux, folder: str | Path) -> None:
    """Write a FluxPriorReduxPipeline without text encoders to `folder`.

    The folder gets image_encoder/, image_embedder/, feature_extractor/ and model_index.json. feature_extractor/ has the
    preprocessing settings of FLUX.1-Redux, but the image size of `redux`.
    """
    folder = Path(folder)
    size = redux.vision.config.image_size
    preprocessor = REDUX_PREPROCESSOR | {"size": {"height": size, "width": size}}
    vision, embedder = redux.vision, redux.embedder
    save_parameters(vision, vision.config.to_dict(), folder / "image_encoder", "model", SIGLIP_TABLE)
    embedder_folder = folder / "image_embedder"
    save_parameters(embedder, embedder.config.to_dict(), embedder_folder, "diffusion_pytorch_model", REDUX_TABLE)
    _write_json(folder / "feature_extractor" / "preprocessor_config.json", preprocessor)
    _write_model_index(
        folder,
        "FluxPriorReduxPipeline",
        image_encoder=("transformers", "SiglipVisionModel"),
        image_embedder=("diffusers", "ReduxImageEncoder"),
        feature_extractor=("transformers", "SiglipImageProcessor"),
    )


def save_fill_pipeline_config(folder: str | Path, scheduler: Mapping[str, Any] | None = None) -> None:
    """Write scheduler/scheduler_config.json and model_index.json of a FluxFillPipeline without text encoders.

    `save_flux` and `save_vae` write the weights into the same folder.

    Args:
        folder: folder of the pipeline.
        scheduler: settings that replace settings of FLUX.1-Fill-dev (`FLUX_SCHEDULER`).

    Raises:
        ValueError: `scheduler` has a key that `FLUX_SCHEDULER` does not have.
    """
    scheduler = dict(scheduler or {})
    if unknown := sorted(set(scheduler) - set(FLUX_SCHEDULER)):
        raise ValueError(f"scheduler has unknown keys {unknown}: the known keys are {sorted(FLUX_SCHEDULER)}.")
    folder = Path(folder)
    _write_json(folder / "scheduler" / "scheduler_config.json", FLUX_SCHEDULER | scheduler)
    _write_model_index(
        folder,
        "FluxFillPipeline",
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
        transformer=("diffusers", "FluxTransformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
    )


def _write_model_index(folder: Path, class_name: str, **components: tuple[str, str]) -> None:
    text_components = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), (None, None))
    _write_json(folder / "model_index.json", {"_class_name": class_name, **components, **text_components})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(content, indent=2) + "\n")


def _read_config(folder: str | Path, component: str, config_type: Any, *model_types: str) -> tuple[Path, Any]:
    """Return the folder of a component, and its config.json as a `config_type`.

    Raises:
        WeightError: the file is missing, is not JSON, has values that `config_type` does not accept, or describes a
            model that is not one of `model_types`. `_class_name` names the model or, if it is missing, `model_type`.
    """
    path = Path(folder) / component
    file = path / "config.json"
    if not file.is_file():
        raise WeightError(f"{file} does not exist: expected the folder of a pipeline in diffusers' layout.")
    try:
        content = json.loads(file.read_text())
        model_type = content.get("_class_name", content.get("model_type"))
        if model_type not in model_types:
            raise ValueError(f"describes a {model_type}; expected {' or '.join(model_types)}.")
        return path, config_type.from_dict(content)
    except ValueError as error:
        raise WeightError(f"{file}: {error}") from error
