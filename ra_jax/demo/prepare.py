"""Prepare the demo on disk: scored scenes, and a tiny FLUX-Fill and Redux in diffusers' layout.

The base is trained on *all* candidates with equal weight, without their scores. It therefore learns to generate both
good and bad results, as FLUX.1-Fill does from images of the web. Training with scores can then improve it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from flax import nnx

from ra_jax.checkpoints import find_checkpoint, restore
from ra_jax.config.parse import from_flat_dict
from ra_jax.config.ranges import at_least, out_of_range
from ra_jax.data.synthetic import DatasetSettings, draw_scenes, stack_scenes, write_dataset
from ra_jax.demo.tiny_vae import TINY_VAE, VAETraining, train_vae
from ra_jax.errors import ConfigError, OutputError
from ra_jax.interop.diffusers import load_flux, save_fill_pipeline_config, save_flux, save_redux, save_vae
from ra_jax.models.flux import Flux, FluxConfig
from ra_jax.models.siglip import Redux, ReduxConfig, SiglipConfig
from ra_jax.outputs import Outputs, check_outputs, check_staging, replace_folder, write_file
from ra_jax.training.loop import train

TINY_FLUX = FluxConfig(
    in_channels=8 * TINY_VAE.latent_channels + 4 * TINY_VAE.factor**2,
    out_channels=4 * TINY_VAE.latent_channels,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=64,
    pooled_projection_dim=32,
    guidance_embeds=True,
    axes_dims_rope=(8, 12, 12),
)
TINY_SIGLIP = SiglipConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14
)
FIRST_HELD_OUT_SCENE = 100_000  # number of the first held-out scene; the scenes to train on are numbered from 0


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the data sets and of the two training runs."""

    mix: str = "no_clean"  # mix of candidates, as for `python -m ra_jax.data synth`
    scenes: Annotated[int, at_least(1)] = 400  # scenes to train on
    held_out_scenes: Annotated[int, at_least(1)] = 16  # scenes held out for validation
    size: Annotated[int, at_least(16)] = 32  # side of the square images, in pixels
    vae_steps: Annotated[int, at_least(1)] = 600  # training steps of the VAE
    base_steps: Annotated[int, at_least(1)] = 650  # training steps of the transformer
    batch_size: Annotated[int, at_least(1)] = 32  # records per training step of the transformer
    seed: Annotated[int, at_least(0)] = 0  # seed of the scenes, the initial weights and the training runs


@dataclass(frozen=True)
class DemoPaths:
    """Paths of the parts of the demo, all inside `root`: two data sets, and the Fill and Redux folders."""

    root: Path

    @property
    def train(self) -> Path:
        """The data set to train on, with scores."""
        return self.root / "data" / "train"

    @property
    def held_out(self) -> Path:
        """The held-out data set, which is not used for training."""
        return self.root / "data" / "held_out"

    @property
    def fill(self) -> Path:
        """The folder of the tiny FLUX-Fill, in diffusers' layout."""
        return self.root / "tiny_flux_fill"

    @property
    def redux(self) -> Path:
        """The folder of the tiny FLUX-Redux, in diffusers' layout."""
        return self.root / "tiny_redux"


def prepare(root: str | Path, settings: DemoSettings) -> DemoPaths:
    """Create the parts of the demo that do not exist yet, and return their paths.

    Parts that an earlier call created with the same settings are kept.

    Raises:
        ConfigError: a setting is out of range.
        OutputError: `root` holds a demo with other settings, or files that no demo wrote.
    """
    paths = DemoPaths(Path(root))
    train_set, held_out_set = _dataset_settings(settings)
    _check_or_write_settings(paths, settings)
    if not paths.train.exists():
        write_dataset(paths.train, train_set)
    if not paths.held_out.exists():
        write_dataset(paths.held_out, held_out_set)
    if not paths.redux.exists():
        with replace_folder(paths.redux) as folder:
            save_redux(_random_redux(settings.seed), folder)
    if not paths.fill.exists():
        with replace_folder(paths.fill) as folder:
            _train_fill(paths, folder, settings)
    return paths


def _dataset_settings(settings: DemoSettings) -> tuple[DatasetSettings, DatasetSettings]:
    """Return the settings of the training set and of the held-out set; raises ConfigError if a setting is invalid."""
    if lines := list(out_of_range(settings)):
        raise ConfigError("\n".join(lines))
    multiple = 2 * TINY_VAE.factor  # One token packs 2 × 2 latent cells of the VAE.
    if settings.size % multiple:
        raise ConfigError(f"size = {settings.size}: expected a multiple of {multiple}, the side of a token in pixels")
    common = {"size": settings.size, "mix": settings.mix, "seed": settings.seed}
    train_set = DatasetSettings(scenes=settings.scenes, **common)
    held_out_set = DatasetSettings(scenes=settings.held_out_scenes, first_scene=FIRST_HELD_OUT_SCENE, **common)
    try:
        train_set.strengths()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return train_set, held_out_set


def _check_or_write_settings(paths: DemoPaths, settings: DemoSettings) -> None:
    """If the demo's folder is new or empty, write settings.json; otherwise compare settings.json with `settings`.

    Raises:
        OutputError: settings.json has other settings, or the folder has files but no settings.json of a demo. Such a
            folder may be a data set of the user, or a link to one.
    """
    root, settings_file = paths.root, paths.root / "settings.json"
    advice = "choose a new or empty folder as --output_dir"
    check_outputs(Outputs("--output_dir", root, [settings_file]), {})
    if root.exists() and any(root.iterdir()):
        earlier_settings = _read_settings(settings_file)
        if earlier_settings is None:
            raise OutputError(f"{root}: holds {min(root.iterdir()).name}, but no settings.json of a demo; {advice}")
        if earlier_settings != asdict(settings):
            raise OutputError(
                f"{root}: was prepared with other settings (then {earlier_settings}, now {asdict(settings)}); delete "
                f"this folder, or {advice}"
            )
        for folder in (paths.train, paths.held_out, paths.redux, paths.fill):
            check_staging(folder)
        return
    root.mkdir(parents=True, exist_ok=True)
    write_file(settings_file, json.dumps(asdict(settings), indent=1))


def _read_settings(file: Path) -> dict | None:
    """Return the content of a demo's settings.json, or None if the file is missing or not the file of a demo."""
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None  # The file is not JSON, or not UTF-8.
    return settings if isinstance(settings, dict) and settings.keys() == asdict(DemoSettings()).keys() else None


def _random_redux(seed: int) -> Redux:
    """Return SigLIP and embedder with random weights.

    They are not trained, because random features of the references distinguish the scenes well enough.
    """
    embedder = ReduxConfig(redux_dim=TINY_SIGLIP.hidden_size, txt_in_features=TINY_FLUX.joint_attention_dim)
    return Redux(TINY_SIGLIP, embedder, rngs=nnx.Rngs(seed))


def _train_fill(paths: DemoPaths, folder: Path, settings: DemoSettings) -> None:
    """Train the VAE, then the transformer on its latents, and save both to `folder`."""
    save_vae(_train_vae(settings), folder)
    save_fill_pipeline_config(folder)
    save_flux(Flux(TINY_FLUX, rngs=nnx.Rngs(settings.seed)), folder)
    run_folder = train(base_config(paths, folder, settings))
    flux = load_flux(folder)
    graph, parameters, rest = nnx.split(flux, nnx.Param, ...)
    averaged = restore(find_checkpoint(run_folder), parameters, prefix="ema/flux")
    save_flux(nnx.merge(graph, averaged, rest), folder)


def _train_vae(settings: DemoSettings):
    """Train the VAE on diptychs: source, ground truth and masked source, each next to the reference of its scene."""
    batch = stack_scenes(draw_scenes(settings.seed, 0, min(settings.scenes, 300), settings.size))
    masked = np.where(batch.mask[..., None], 0.5, batch.source)
    photos = np.concatenate([batch.source, batch.truth, masked]).astype(np.float32)
    references = np.concatenate([batch.reference] * 3).astype(np.float32)
    order = np.random.default_rng(settings.seed).permutation(len(photos))
    training = VAETraining(steps=settings.vae_steps, crop=settings.size // 2, seed=settings.seed)
    return train_vae(references[order], photos[order], TINY_VAE, training)


def base_config(paths: DemoPaths, folder: Path, settings: DemoSettings):
    """Return the configuration for training the tiny base.

    The whole transformer is trained from its initial weights, on all candidates with equal weight.

    Args:
        paths: paths of the data set and Redux.
        folder: Fill folder with the initial weights.
        settings: settings of the demo.
    """
    return from_flat_dict(
        {
            "train_json_path": str(paths.train / "labeled_dict.json"),
            "output_dir": str(paths.root / "base_training"),
            "overwrite_output_dir": True,
            "pretrained_model_name_or_path": str(folder),
            "pretrained_redux_model_name_or_path": str(paths.redux),
            "aspect_ratio_buckets": f"{settings.size},{settings.size}",
            "mask_augmentation": False,
            "mixed_precision": "no",
            "gradient_checkpointing": "none",
            "max_sequence_length": 4,
            "train_batch_size": settings.batch_size,
            "max_train_steps": settings.base_steps,
            "learning_rate": 2e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": min(50, settings.base_steps // 4),
            "adam_weight_decay": 0.0,
            "ema_decay": 0.99,
            "checkpointing_steps": 0,
            "validation_steps": 0,
            "log_freq": 10,
            "report_to": ["none"],
            "seed": settings.seed,
        }
    )
