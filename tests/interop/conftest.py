"""A small Fill and Redux model of random float32 weights, and copies of its folder with something wrong."""

import shutil

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


@pytest.fixture(scope="session")
def models():
    """Flux, AutoencoderKL and Redux, by the names flux, vae, redux."""
    rng = np.random.default_rng(0)
    makes = {
        "flux": lambda: Flux(FLUX, rngs=nnx.Rngs(0)),
        "vae": lambda: AutoencoderKL(VAE, rngs=nnx.Rngs(0)),
        "redux": lambda: Redux(VISION, EMBEDDER, rngs=nnx.Rngs(0)),
    }
    modules = {name: nnx.eval_shape(make) for name, make in makes.items()}
    for module in modules.values():
        draw = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), nnx.state(module))
        nnx.update(module, draw)
    return modules


@pytest.fixture(scope="session")
def folder(models, tmp_path_factory):
    """A Fill and a Redux folder in one, written by this package. Nobody may write into it."""
    folder = tmp_path_factory.mktemp("ours")
    save_flux(models["flux"], folder)
    save_vae(models["vae"], folder)
    save_redux(models["redux"], folder)
    return folder


@pytest.fixture
def copied_folder(folder, tmp_path):
    """A copy of the folder that a test may change."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def change_tensors():
    """change_tensors(folder, component, change): call `change` with the component's tensors and write them back."""

    def rewrite(folder, component, change):
        file = next((folder / component).glob("*.safetensors"))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return rewrite
