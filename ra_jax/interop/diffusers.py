"""Models in and out of diffusers' folders, tensor by tensor.

Folders are whole pipelines: FLUX.1-Fill (`transformer/`, `vae/`) or FLUX.1-Redux (`image_encoder/`,
`image_embedder/`, `feature_extractor/`), on disk or on the Hugging Face hub.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ra_jax.errors import WeightError
from ra_jax.interop.diffusers_tables import FLUX, REDUX, SIGLIP, VAE
from ra_jax.interop.transfer import Place, fill, store
from ra_jax.models.attention import implementation_for
from ra_jax.models.flux import Flux, FluxConfig
from ra_jax.models.lora import LoRAConfig, attach_experts
from ra_jax.models.siglip import Redux, ReduxConfig, SiglipConfig
from ra_jax.models.vae import AutoencoderKL, VAEConfig
from ra_jax.parallel.partitioning import Placement

log = logging.getLogger(__name__)

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


def load_flux(
    folder: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    lora: LoRAConfig | None = None,
    int8: bool = False,
    remat: str = "none",
    attention: str | None = None,
    rngs: nnx.Rngs | None = None,
    placement: Placement | None = None,
) -> Flux:
    """The transformer in `folder`/transformer, with fresh experts if `lora` is given.

    Args:
        folder: of the pipeline.
        dtype, param_dtype, lora, int8, remat, attention: as in `Flux`; the files may be of any float type. Without
            `attention` it is that of the devices here (`attention.implementation_for`).
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
            jax.default_backend(), dtype=dtype, head_dim=config.attention_head_dim, devices=devices
        )
        log.info("attention: %s", attention)
    options = {"dtype": dtype, "param_dtype": param_dtype, "int8": int8, "remat": remat, "attention": attention}
    if lora is not None and rngs is None:
        raise ValueError("rngs is None: expected nnx.Rngs, since lora asks for experts with first values.")
    base = nnx.eval_shape(lambda: Flux(config, rngs=nnx.Rngs(0), **options))
    flux = fill(base, path, FLUX, _place("flux", placement))
    if lora is None:
        return flux
    mixture = nnx.eval_shape(lambda: Flux(config, lora=lora, rngs=nnx.Rngs(0), **options))
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
    path.write_text(json.dumps(content, indent=2) + "\n")


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
