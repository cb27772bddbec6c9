"""Small Fill and Redux models with random float32 weights, and folders with their weights."""

import shutil
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ra_jax.interop.diffusers import save_flux, save_redux, save_vae
from ra_jax.models.flux import Flux, FluxConfig
from ra_jax.models.siglip import Redux, ReduxConfig, SiglipConfig
from ra_jax.models.vae import AutoencoderKL, VAEConfig

FLUX = FluxConfig(
    in_channels=28,
    out_channels=12,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=6,
    guidance_embeds=True,
    axes_dims_rope=(2, 2, 4),
)
VAE = VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3, shift_factor=0.25)
VISION = SiglipConfig(
    hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
EMBEDDER = ReduxConfig(redux_dim=16, txt_in_features=24)


@dataclass(frozen=True)
class Models:
    """The models of a Fill and a Redux folder."""

    flux: Flux
    vae: AutoencoderKL
    redux: Redux


@pytest.fixture(scope="session")
def models():
    rng = np.random.default_rng(0)
    constructors = {
        "flux": lambda: Flux(FLUX, rngs=nnx.Rngs(0)),
        "vae": lambda: AutoencoderKL(VAE, rngs=nnx.Rngs(0)),
        "redux": lambda: Redux(VISION, EMBEDDER, rngs=nnx.Rngs(0)),
    }
    modules = {name: nnx.eval_shape(construct) for name, construct in constructors.items()}
    for module in modules.values():
        weights = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), nnx.state(module))
        nnx.update(module, weights)
    return Models(**modules)


@pytest.fixture(scope="session")
def model_folder(models, tmp_path_factory):
    """One folder with the Fill and the Redux model, written by ra_jax. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("ours")
    save_flux(models.flux, folder)
    save_vae(models.vae, folder)
    save_redux(models.redux, folder)
    return folder


@pytest.fixture
def copied_folder(model_folder, tmp_path):
    """A copy of `model_folder` that a test may change."""
    return shutil.copytree(model_folder, tmp_path / "copy")


@pytest.fixture
def change_tensors():
    """change_tensors(folder, component, change): apply `change` to the dict of the component's tensors and save it."""

    def rewrite(folder, component, change):
        file = next((folder / component).glob("*.safetensors"))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return rewrite
