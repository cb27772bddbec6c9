"""The remover on arrays: its diptych, the noise of each image, and the effect of the trained weights."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ra_jax.data.diptych import right_panel
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.inference.sampling import as_diptych, diptych_mask, initial_noise, make_remover

SIZE = 16


@pytest.fixture(scope="module")
def batch():
    """Two conditions of 16 × 16 pixels, with Redux inputs."""
    rng = np.random.default_rng(0)
    photos = {name: rng.integers(0, 256, (2, SIZE, SIZE, 3), np.uint8) for name in ("source", "reference")}
    mask = np.zeros((2, SIZE, SIZE), np.uint8)
    mask[:, 4:10, 6:14] = 1
    return photos | {"mask": mask, "redux_pixels": rng.normal(size=(2, 28, 28, 3)).astype(np.float32)}


def test_the_photo_is_the_right_panel_and_the_left_panel_is_not_masked(batch):
    diptych, mask = np.asarray(as_diptych(batch, "source")), np.asarray(diptych_mask(batch))
    assert diptych.shape == (2, SIZE, 2 * SIZE, 3)
    np.testing.assert_allclose(diptych[:, :, SIZE:], batch["source"] / 255, atol=1e-6)
    np.testing.assert_allclose(diptych[:, :, :SIZE], batch["reference"] / 255, atol=1e-6)
    assert mask.dtype == np.float32 and not mask[:, :, :SIZE].any()
    np.testing.assert_array_equal(right_panel(mask[..., None])[..., 0], batch["mask"])


def test_the_noise_of_each_image_depends_only_on_its_key():
    model = SimpleNamespace(size_multiple=8, latent_features=16)
    keys = jax.random.split(jax.random.key(0), 3)
    noise = np.asarray(initial_noise(model, keys, 32, 48))
    assert noise.shape == (3, 2 * 4 * 6, 16)
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(initial_noise(model, keys[order], 32, 48), noise[order])
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert np.abs(np.corrcoef(noise.reshape(3, -1)) - np.eye(3)).max() < 0.15


def test_experts_and_router_weights_change_the_images(tiny_experts, batch):
    remove = make_remover(tiny_experts.model, FlowSchedule(), num_inference_steps=2, guidance_scale=30.0)
    noise = np.random.default_rng(1).normal(size=(2, 8, 16)).astype(np.float32)

    def remove_with(**changes):
        return remove(tiny_experts.trainable | changes, tiny_experts.frozen, batch, noise)

    images, gates = remove_with()
    assert images.shape == (2, SIZE, SIZE, 3)
    assert images.min() >= 0 and images.max() <= 1
    flux, router = (jax.tree.map(lambda x: 0 * x, tiny_experts.trainable[part]) for part in ("flux", "router"))
    without_experts, same_gates = remove_with(flux=flux)
    assert np.abs(without_experts - images).max() > 0.05
    np.testing.assert_array_equal(same_gates, gates)
    other_mix, other_gates = remove_with(router=router)
    np.testing.assert_allclose(other_gates, 0.5, rtol=1e-5)
    assert np.abs(other_mix - images).max() > 0.005
