"""Train a small AutoencoderKL from scratch, with whitened latents."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from ra_jax.models.vae import AutoencoderKL, VAEConfig

TINY_VAE = VAEConfig(
    block_out_channels=(12, 24, 48),
    layers_per_block=1,
    latent_channels=8,
    # Normalization subtracts the mean of each group of channels. With groups of three channels, this would remove the
    # color of the image.
    norm_num_groups=1,
    mid_block_add_attention=False,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


MEASURED_DIPTYCHS = 128  # number of diptychs on which the statistics of the latents are measured
# Initial log-variance of the posterior. With 0, the noise would hide the weak colors of the scenes.
INITIAL_LOGVAR = -6.0


@dataclass(frozen=True)
class VAETraining:
    """Settings for training the VAE with Adam on the loss mean |x̂ − x| + 2·mean (x̂ − x)² + kl_weight·KL.

    Attributes:
        steps: number of training steps.
        batch_size: crops per step.
        crop: side of the crops in pixels.
        learning_rate: peak learning rate.
        kl_weight: weight of the KL divergence to a standard normal distribution.
        whiten_at: fraction of the steps after which the latents are whitened.
        seed: seed of the initial weights, the crops and the noise.
    """

    steps: int = 900
    batch_size: int = 16
    crop: int = 16
    learning_rate: float = 3e-3
    kl_weight: float = 1e-5
    whiten_at: float = 0.7
    seed: int = 0


def train_vae(references: np.ndarray, photos: np.ndarray, config: VAEConfig, training: VAETraining) -> AutoencoderKL:
    """Train an autoencoder for diptychs, and measure its scaling and shift factors on diptychs.

    Training uses crops of `VAETraining.crop` pixels from both panels, side by side. With crops of half the image side,
    a step costs a quarter of a step on whole diptychs. The statistics of crops and of whole diptychs are the same.

    Late in training, the latents are whitened once by a linear map. The map is folded into the encoder's last
    convolution, and its inverse into the decoder's first convolution. A diffusion model then learns every channel at
    the same signal-to-noise ratio. Whitening also changes which latent the decoder's zero padding represents. The
    remaining steps adapt the image borders to this change.

    Args:
        references: left panels [R, H, W, 3] float32 in [0, 1].
        photos: right panels of the same diptychs [R, H, W, 3] float32 in [0, 1].
        config: sizes of the autoencoder.
        training: settings of the training.
    """
    vae = AutoencoderKL(config, rngs=nnx.Rngs(training.seed))
    _set_initial_logvar(vae)
    graph, weights = nnx.split(vae)
    schedule = optax.warmup_cosine_decay_schedule(0.0, training.learning_rate, training.steps // 20, training.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    def loss_fn(weights, batch, key):
        vae = nnx.merge(graph, weights)
        mean, logvar = vae.encode(batch)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = vae.decode(latents) - batch
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar).mean()
        return jnp.abs(error).mean() + 2.0 * (error**2).mean() + training.kl_weight * kl

    @jax.jit
    def step(weights, opt_state, batch, key):
        loss, gradients = jax.value_and_grad(loss_fn)(weights, batch, key)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(weights, updates), opt_state, loss

    rng = np.random.default_rng(training.seed)
    diptychs = np.concatenate([references[:MEASURED_DIPTYCHS], photos[:MEASURED_DIPTYCHS]], axis=2)
    opt_state = optimizer.init(weights)
    for i in tqdm(range(training.steps), desc="VAE", unit="step"):
        if i == int(training.whiten_at * training.steps):
            weights = _whiten_latents(graph, weights, diptychs)
            # Adam's moments are reset, but the step counts, which are scalars, are kept.
            opt_state = jax.tree.map(lambda x: jnp.zeros_like(x) if x.ndim else x, opt_state)
        batch = 2.0 * _draw_crops(references, photos, training, rng) - 1.0
        weights, opt_state, _ = step(weights, opt_state, batch, jax.random.fold_in(jax.random.key(training.seed), i))
    latents = _encode_cells(graph, weights, diptychs)
    vae = nnx.merge(graph, weights)
    vae.config = replace(config, shift_factor=float(latents.mean()), scaling_factor=float(1.0 / latents.std()))
    return vae


def _set_initial_logvar(vae: AutoencoderKL) -> None:
    """Set the encoder's log-variance to `INITIAL_LOGVAR` for every image, in place."""
    conv_out, channels = vae.encoder.conv_out, vae.config.latent_channels
    conv_out.kernel[...] = conv_out.kernel[...].at[..., channels:].set(0.0)
    conv_out.bias[...] = conv_out.bias[...].at[channels:].set(INITIAL_LOGVAR)


def _draw_crops(
    references: np.ndarray, photos: np.ndarray, training: VAETraining, rng: np.random.Generator
) -> np.ndarray:
    """Draw crops [batch_size, crop, 2·crop, 3]: the same random window of a reference and of its photo."""
    rows = rng.integers(len(photos), size=training.batch_size)
    offsets = rng.integers(photos.shape[1] - training.crop + 1, size=(training.batch_size, 2))
    windows = [
        np.s_[row, y : y + training.crop, x : x + training.crop] for row, (y, x) in zip(rows, offsets, strict=True)
    ]
    return np.stack([np.concatenate([references[window], photos[window]], axis=1) for window in windows])


def _encode_cells(graph, weights, images: np.ndarray) -> np.ndarray:
    """Encode images and return the posterior mean of every latent cell, [cells, C]."""
    mean, _ = jax.jit(lambda weights, x: nnx.merge(graph, weights).encode(x))(weights, 2.0 * images - 1.0)
    return np.asarray(mean).reshape(-1, mean.shape[-1])


def _whiten_latents(graph, weights, images: np.ndarray):
    """Return weights whose latents z' have zero mean and unit covariance over `images`.

        z' = W(z − μ),  W = Σ^{−1/2}

    W and μ are folded into the encoder's last convolution. W⁻¹ and μ are folded into kernel and bias of the decoder's
    first convolution. The autoencoder reconstructs the same images, except where the padding of this convolution has an
    effect.
    """
    cells = _encode_cells(graph, weights, images)
    eigenvalues, eigenvectors = np.linalg.eigh(np.cov(cells.T))
    deviations = np.sqrt(np.maximum(eigenvalues, 1e-6))
    whiten = jnp.asarray(eigenvectors / deviations @ eigenvectors.T, jnp.float32)
    unwhiten = jnp.asarray(eigenvectors * deviations @ eigenvectors.T, jnp.float32)
    mean = jnp.asarray(cells.mean(0), jnp.float32)
    vae = nnx.merge(graph, weights)
    conv_out, conv_in, channels = vae.encoder.conv_out, vae.decoder.conv_in, cells.shape[1]
    log_scale = jnp.log(jnp.diag(whiten))  # scaling a channel by s adds 2·log s to its log-variance
    kernel, bias = conv_out.kernel[...], conv_out.bias[...]
    conv_out.kernel[...] = jnp.concatenate([kernel[..., :channels] @ whiten, kernel[..., channels:]], -1)
    conv_out.bias[...] = jnp.concatenate([(bias[:channels] - mean) @ whiten, bias[channels:] + 2.0 * log_scale])
    conv_in.bias[...] = conv_in.bias[...] + mean @ conv_in.kernel[...].sum((0, 1))
    conv_in.kernel[...] = jnp.einsum("ij,hwjo->hwio", unwhiten, conv_in.kernel[...])
    return nnx.split(vae)[1]
