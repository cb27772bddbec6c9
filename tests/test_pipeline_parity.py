"""`RemovalPipeline` on arrays agrees with diffusers' FluxFillPipeline. Both read the same folder in float32.

diffusers samples the latents of the masked image from the posterior of the VAE, while ra_jax uses its mean. The fixture
`use_mean_latents` makes diffusers use the mean, too. One test instead passes the sample of diffusers to ra_jax.
"""

from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from ra_jax.models.siglip import preprocess
from ra_jax.pipeline import RemovalPipeline

if find_spec("torch"):
    import torch
    from diffusers import AutoencoderKL, FluxFillPipeline, FluxPriorReduxPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

NO_TEXT = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
STEPS, GUIDANCE = 5, 30.0
LATENTS_LIMIT, PIXELS_LIMIT = 1e-3, 2 / 255


@dataclass(frozen=True)
class Case:
    """A batch of two.

    Attributes:
        image: [B, H, W, 3].
        mask: [B, H, W], soft.
        context: [B, S, joint_dim].
        noise: [B, N, 4C].
    """

    image: np.ndarray
    mask: np.ndarray
    context: np.ndarray
    noise: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        return self.mask.shape[1:]


def make_case(height: int, width: int, factor: int) -> Case:
    rng = np.random.default_rng(0)
    mask = np.zeros((2, height, width), np.float32)
    mask[0, height // 4 : height // 2 + 3, width // 3 : -5] = rng.uniform(size=1) * 0.4 + 0.6
    mask[1] = rng.uniform(size=(height, width))
    tokens = height * width // (2 * factor) ** 2
    shapes = (2, height, width, 3), (2, 12, 32), (2, tokens, 16)
    image, context, noise = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return Case(1 / (1 + np.exp(-image)), mask, context, noise)


def channels_first(x: np.ndarray) -> "torch.Tensor":
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def run_diffusers(folder, case: Case, generator=None) -> tuple[np.ndarray, np.ndarray]:
    """Run diffusers; returns the final packed latents [B, N, 4C] and the images [B, H, W, 3], clipped to [0, 1]."""
    pipeline = FluxFillPipeline.from_pretrained(folder, **NO_TEXT)
    pipeline.set_progress_bar_config(disable=True)
    final_tensors = {}

    def record_tensors(pipeline, step, timestep, tensors):
        final_tensors.update(tensors)
        return {}

    height, width = case.size
    images = pipeline(
        image=channels_first(case.image),
        mask_image=torch.from_numpy(case.mask)[:, None],
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(case.noise),
        prompt_embeds=torch.from_numpy(case.context),
        pooled_prompt_embeds=torch.zeros(len(case.image), pipeline.transformer.config.pooled_projection_dim),
        generator=generator,
        output_type="np",
        callback_on_step_end=record_tensors,
    ).images
    return final_tensors["latents"].numpy(), images


def run_pipeline(pipe: RemovalPipeline, case: Case, **options) -> tuple[np.ndarray, np.ndarray]:
    """Run `RemovalPipeline`; returns the final packed latents [B, N, 4C] and the images [B, H, W, 3], not clipped."""
    cond = pipe.condition(case.image, case.mask, case.context, **options)
    latents = pipe.denoise(case.noise, cond, STEPS, GUIDANCE)
    return np.asarray(latents), np.asarray(pipe.decode(latents, *case.size))


def assert_agree(actual, expected) -> None:
    """Compare two pairs (latents, images). Images of a random network exceed [0, 1]; diffusers clips them."""
    error = np.linalg.norm(actual[0] - expected[0]) / np.linalg.norm(expected[0])
    assert error <= LATENTS_LIMIT
    assert actual[1].shape == expected[1].shape
    assert ((actual[1] > 0) & (actual[1] < 1)).mean() > 0.2
    assert np.abs(actual[1].clip(0, 1) - expected[1]).max() <= PIXELS_LIMIT


def relative_change(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture
def use_mean_latents(monkeypatch):
    """Make diffusers encode to the mean of the posterior."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)


@pytest.mark.torch
@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize("size", [(4, 4), (3, 5)], ids=["square", "oblong"])
def test_latents_and_images_agree_with_diffusers(make_tiny_fill, tiny_pipeline, use_mean_latents, size, factor):
    case = make_case(*(2 * factor * side for side in size), factor)
    pipe = tiny_pipeline
    if factor != pipe.model.factor:
        pipe = RemovalPipeline.from_pretrained(make_tiny_fill(factor), dtype="float32")
    actual, expected = run_pipeline(pipe, case), run_diffusers(make_tiny_fill(factor), case)
    assert_agree(actual, expected)
    assert relative_change(actual[0], case.noise) > 0.5


@pytest.mark.torch
def test_sampled_latents_of_the_masked_image_can_be_passed(tiny_fill, tiny_pipeline):
    case = make_case(32, 32, 4)
    expected = run_diffusers(tiny_fill, case, torch.Generator().manual_seed(3))

    vae = AutoencoderKL.from_pretrained(tiny_fill, subfolder="vae")
    masked_image = channels_first((2 * case.image - 1) * (case.mask < 0.5)[..., None])
    with torch.no_grad():
        sampled = vae.encode(masked_image).latent_dist.sample(torch.Generator().manual_seed(3))
    sampled = (sampled - vae.config.shift_factor) * vae.config.scaling_factor
    sampled = FluxFillPipeline._pack_latents(sampled, *sampled.shape).numpy()

    actual = run_pipeline(tiny_pipeline, case, masked_latents=sampled)
    assert_agree(actual, expected)
    with_mean = run_pipeline(tiny_pipeline, case)
    assert relative_change(with_mean[0], actual[0]) > 10 * LATENTS_LIMIT


@pytest.mark.torch
def test_redux_tokens_after_the_empty_prompt_agree_with_diffusers(
    tiny_fill, tiny_redux, tiny_pipeline, use_mean_latents
):
    reference = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8))
    prior = FluxPriorReduxPipeline.from_pretrained(tiny_redux, **NO_TEXT)
    with torch.no_grad():
        expected_tokens = prior.image_embedder(prior.encode_image(reference, "cpu", 1)).image_embeds.numpy()
    tokens = np.asarray(tiny_pipeline.redux(preprocess(tiny_redux)(reference)[None]))
    assert np.linalg.norm(tokens - expected_tokens) <= 1e-4 * np.linalg.norm(expected_tokens)

    case = make_case(32, 32, 4)
    empty_prompt = np.zeros((2, 8, 32), np.float32)
    case = replace(case, context=np.concatenate([empty_prompt, expected_tokens.repeat(2, 0)], axis=1))
    actual = run_pipeline(
        tiny_pipeline, replace(case, context=np.concatenate([empty_prompt, tokens.repeat(2, 0)], axis=1))
    )
    assert_agree(actual, run_diffusers(tiny_fill, case))
    without_tokens = run_pipeline(tiny_pipeline, replace(case, context=np.zeros_like(case.context)))
    assert relative_change(without_tokens[0], actual[0]) > 10 * LATENTS_LIMIT


def test_the_default_context_is_the_empty_prompt_and_guidance_changes_the_velocity(tiny_pipeline):
    case = make_case(32, 32, 4)
    cond = tiny_pipeline.condition(case.image, case.mask)
    assert cond.fill.shape == (2, 16, 16 + 64)
    assert cond.context.shape == (2, 8, 32) and not np.any(cond.context)
    assert cond.pooled.shape == (2, 16) and not np.any(cond.pooled)

    t = np.array([0.9, 0.4], np.float32)
    velocity = tiny_pipeline.velocity(case.noise, t, cond, GUIDANCE)
    assert velocity.shape == case.noise.shape
    assert relative_change(tiny_pipeline.velocity(case.noise, t, cond, 2.0), velocity) > 0.01
