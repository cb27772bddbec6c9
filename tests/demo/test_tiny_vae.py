"""The tiny VAE: whitening changes the basis of the latents, and training gives a VAE that reconstructs images."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from ra_jax.demo.tiny_vae import TINY_VAE, VAETraining, _encode_cells, _whiten_latents, train_vae
from ra_jax.models.vae import AutoencoderKL


@pytest.fixture(scope="module")
def images():
    """Smooth random images [24, 32, 32, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:32, 0:32] / 32
    phases = rng.uniform(0, 6, (24, 1, 1, 3))
    waves = np.sin(6 * (x * rng.uniform(0, 1, (24, 1, 1)) + y * rng.uniform(0, 1, (24, 1, 1))))[..., None]
    return (0.5 + 0.4 * np.sin(3 * waves + phases)).astype(np.float32)


def test_whitened_latents_have_unit_covariance_and_the_same_decoder_features(images):
    graph, weights = nnx.split(AutoencoderKL(TINY_VAE, rngs=nnx.Rngs(0)))
    weights = jax.tree.map(lambda x: x + 0.05, weights)  # so that biases are not 0
    old_weights = jax.tree.map(np.array, weights)
    cells = _encode_cells(graph, weights, images)
    whitened = _whiten_latents(graph, weights, images)
    new_cells = _encode_cells(graph, whitened, images)
    np.testing.assert_allclose(np.cov(new_cells.T), np.eye(8), atol=0.02)
    np.testing.assert_allclose(new_cells.mean(0), 0.0, atol=1e-3)

    old_vae, new_vae = nnx.merge(graph, old_weights), nnx.merge(graph, whitened)
    shape = (len(images), 8, 8, 8)
    old_features = np.asarray(old_vae.decoder.conv_in(cells.reshape(shape)))
    new_features = np.asarray(new_vae.decoder.conv_in(new_cells.reshape(shape)))
    # Away from the padding at the border, the first layer of the decoder gives the same features.
    np.testing.assert_allclose(
        new_features[:, 1:-1, 1:-1], old_features[:, 1:-1, 1:-1], atol=2e-3 * np.abs(old_features).max()
    )


def test_a_trained_vae_reconstructs_images_and_has_standardized_latents(images):
    training = VAETraining(steps=250, batch_size=4, crop=16)
    vae = train_vae(images, images[::-1], replace(TINY_VAE, block_out_channels=(8, 8, 8)), training)
    diptych = np.concatenate([images, images[::-1]], axis=2)
    mean, _ = vae.encode(2.0 * diptych - 1.0)
    latents = np.asarray(vae.normalize(mean))
    assert abs(latents.mean()) < 0.05 and abs(latents.std() - 1.0) < 0.05
    error = np.asarray(vae.decode(mean) + 1.0) / 2.0 - diptych
    assert (error**2).mean() < 0.5 * diptych.var()  # an untrained VAE does not explain any variance
