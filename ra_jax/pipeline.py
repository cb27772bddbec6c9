"""`RemovalPipeline`: removes objects from photos with FLUX.1-Fill and trained experts."""

import logging
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ra_jax.checkpoints import check_base, find_checkpoint, read_metadata, restore
from ra_jax.config.parse import from_checkpoint
from ra_jax.config.settings import ModelConfig
from ra_jax.data.images import soft_mask, upright_rgb
from ra_jax.data.loader import parse_buckets
from ra_jax.flow.samplers import sample_euler
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.inference.blend import paste
from ra_jax.inference.crop import panel_sizes, plan_crop
from ra_jax.inference.sampling import initial_noise, make_remover
from ra_jax.interop.diffusers import LoadedModel, load_fill_model
from ra_jax.models.conditioning import Condition
from ra_jax.models.fill_model import Weights
from ra_jax.models.lora import Adapter
from ra_jax.models.options import ModelOptions, expert_configs

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
# Largest area in pixels of the panel in which a photo is edited. If there are experts, their largest training bucket
# determines this area instead.
PANEL_AREA = 512 * 512


@dataclass(frozen=True)
class RemovalOutput:
    """Result of a call to `RemovalPipeline`.

    Attributes:
        images: PIL images of the photo's size.
        gates: the experts' weights, float32 [num_images, num_experts]; None without experts.
    """

    images: list[Image.Image]
    gates: np.ndarray | None


class RemovalPipeline:
    """Object removal with FLUX.1-Fill and, optionally, trained experts; create it with `from_pretrained`.

    `pipe(image, mask)` edits a photo. The methods `condition`, `redux`, `velocity`, `denoise` and `decode` do single
    steps of this, on arrays. They process an image as a whole, not as a diptych. Their results can therefore be
    compared, number for number, with the results of diffusers' FluxFillPipeline.
    """

    def __init__(self, loaded: LoadedModel, schedule: FlowSchedule, weights: Weights, panel_area: int = PANEL_AREA):
        self.model, self.schedule = loaded.model, schedule
        self._loaded, self._weights, self._panel_area = loaded, weights, panel_area
        self._get_remover = lru_cache(maxsize=4)(
            lambda steps, guidance: make_remover(
                loaded.model, schedule, num_inference_steps=steps, guidance_scale=guidance
            )
        )
        self._velocity = jax.jit(self._compute_velocity)
        self._denoise = jax.jit(self._run_sampler, static_argnames="num_inference_steps")
        self._decode = jax.jit(loaded.model.decode, static_argnames="grid")
        self._condition = jax.jit(loaded.model.condition)
        self._image_tokens = jax.jit(loaded.model.image_tokens)

    @classmethod
    def from_pretrained(
        cls,
        fill: str | Path,
        redux: str | Path | None = None,
        experts: str | Path | None = None,
        dtype: str = "bfloat16",
        *,
        max_sequence_length: int | None = None,
    ) -> "RemovalPipeline":
        """Load FLUX.1-Fill, FLUX.1-Redux and trained experts.

        Args:
            fill: folder or hub id of FLUX.1-Fill.
            redux: folder or hub id of FLUX.1-Redux; None for no image tokens.
            experts: output folder of a training run (the checkpoint in `best/` is used, else the latest), or a
                checkpoint; None for the base without experts. If the checkpoint has an exponential moving average of
                the weights, the averaged weights are loaded.
            dtype: dtype of the matmuls, "bfloat16" or "float32".
            max_sequence_length: number of prompt tokens. None selects the number that the experts were trained with. If
                there are no experts, None selects the default of training.

        Raises:
            WeightError: the base could not be loaded.
            CheckpointError: the checkpoint could not be loaded, or was trained on another base.
            ValueError: `dtype` is not one of the two.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)} (float16 overflows in FLUX)")
        checkpoint = None if experts is None else find_checkpoint(experts, prefer_best=True)
        if checkpoint is not None:
            log.info("experts: %s", checkpoint)
        metadata = None if checkpoint is None else read_metadata(checkpoint)
        config = None if metadata is None else from_checkpoint(metadata.config)
        lora, router = (None, None) if config is None else expert_configs(config.experts)
        if max_sequence_length is None:
            max_sequence_length = (ModelConfig if config is None else config.model).max_sequence_length
        options = ModelOptions(
            dtype=DTYPES[dtype],
            text_tokens=max_sequence_length,
            lora=lora,
            router=router,
            train_base=config is not None and not config.experts.use_lora,
        )
        loaded = load_fill_model(str(fill), None if redux is None else str(redux), options)
        schedule = FlowSchedule.from_folder(loaded.folder)
        if config is None:
            return cls(loaded, schedule, loaded.trainable)
        check_base(checkpoint, metadata, loaded.fingerprint)
        prefix = "ema" if config.optimization.ema_decay else "trainable"
        weights = restore(checkpoint, loaded.trainable, prefix=prefix)
        panel_area = max(height * width for height, width in parse_buckets(config.data.aspect_ratio_buckets))
        return cls(loaded, schedule, weights, panel_area)

    def __call__(
        self,
        image: Image.Image,
        mask: Image.Image,
        ref: Image.Image | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 30.0,
        seed: int = 0,
        num_images: int = 1,
        latents: np.ndarray | None = None,
    ) -> RemovalOutput:
        """Remove the object under `mask` from `image`.

        A window around the mask is edited next to the reference and blended into the image. Pixels outside the
        feathered mask stay unchanged, bit for bit. Raises ValueError for an empty mask or an argument of wrong size.

        Args:
            image: the photo.
            mask: mask of the photo's size, > 127 = remove. A soft edge gives a soft transition.
            ref: reference image of the object; by default, the masked object on white.
            num_inference_steps: number of sampling steps.
            guidance_scale: embedded guidance.
            seed: seed of the noise. The noise of image i depends only on (seed, i).
            num_images: number of results.
            latents: packed noise [num_images, N, 4C] of the diptych, used instead of noise from `seed`.
        """
        photo, mask_values = np.asarray(upright_rgb(image)), soft_mask(mask)
        if mask_values.shape != photo.shape[:2]:
            raise ValueError(
                f"mask of size {mask_values.shape[::-1]} for an image of size {photo.shape[1::-1]}: expected equal "
                "sizes (width, height) after both are turned upright"
            )
        if num_images < 1:
            raise ValueError(f"num_images={num_images}: expected at least 1")
        multiple = self.model.size_multiple
        crop = plan_crop(mask_values, panel_sizes(self._panel_area, multiple), multiple=multiple)
        reference = None if ref is None else np.asarray(upright_rgb(ref))
        panels = {
            "source": crop.photo(photo),
            "mask": crop.mask(mask_values),
            "reference": crop.reference(reference, photo, mask_values),
        }
        if self._loaded.preprocess is not None:
            panels["redux_pixels"] = self._loaded.preprocess(Image.fromarray(panels["reference"]))
        if latents is None:
            keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(num_images))
            latents = initial_noise(self.model, keys, *crop.size)
        height, width = crop.size
        shape = (num_images, 2 * height * width // multiple**2, self.model.latent_features)
        if latents.shape != shape:
            raise ValueError(
                f"latents of shape {latents.shape}: expected {shape}, the packed noise [num_images, N, 4C] of a "
                f"diptych; this photo is edited in panels of {height} × {width} pixels"
            )
        batch = {name: np.repeat(panel[None], num_images, 0) for name, panel in panels.items()}
        remove = self._get_remover(num_inference_steps, float(guidance_scale))
        edited, gates = remove(self._weights, self._loaded.frozen, batch, jnp.asarray(latents, jnp.float32))
        images = [Image.fromarray(paste(photo, panel, mask_values, crop)) for panel in np.asarray(edited)]
        return RemovalOutput(images, None if gates is None else np.asarray(gates))

    def condition(
        self,
        image: jax.Array,
        mask: jax.Array,
        context: jax.Array | None = None,
        *,
        masked_latents: jax.Array | None = None,
    ) -> Condition:
        """Compute the condition for filling `mask` in `image`.

        The condition has the fill channels [B, N, 4C + 4f²], the context [B, S, joint_dim] and the pooled text
        embedding [B, P].

        Args:
            image: [B, H, W, 3] in [0, 1].
            mask: [B, H, W], ≥ 0.5 = fill.
            context: [B, S, joint_dim], used instead of the empty prompt. Image tokens from `redux` have to be appended
                to it by the caller.
            masked_latents: [B, N, 4C], packed and standardized, used instead of encoding the masked image. The default
                encoding is the mean of the VAE's posterior. (diffusers draws a sample from the posterior.)
        """
        binary = (jnp.asarray(mask) >= 0.5).astype(jnp.float32)
        return self._condition(
            self._loaded.frozen, jnp.asarray(image), binary, text=context, masked_latents=masked_latents
        )

    def redux(self, pixels: jax.Array) -> jax.Array:
        """Encode preprocessed pixels [B, s, s, 3] to image tokens [B, T, joint_dim].

        Raises:
            ValueError: the pipeline was loaded without Redux.
        """
        if self.model.redux is None:
            raise ValueError("this pipeline has no Redux: load it with from_pretrained(..., redux=FOLDER)")
        return self._image_tokens(self._loaded.frozen, pixels)

    def velocity(self, latents: jax.Array, t: jax.Array, cond: Condition, guidance_scale: float = 30.0) -> jax.Array:
        """Compute the velocity v_θ(x_t, t, c) [B, N, 4C] in float32, for t [B] in (0, 1].

        If experts are loaded, the router mixes them.
        """
        return self._velocity(self._weights, self._loaded.frozen, latents, t, cond, guidance_scale=guidance_scale)

    def denoise(
        self, latents: jax.Array, cond: Condition, num_inference_steps: int = 28, guidance_scale: float = 30.0
    ) -> jax.Array:
        """Run the Euler sampler from noise [B, N, 4C] to the final packed latents [B, N, 4C]."""
        return self._denoise(
            self._weights,
            self._loaded.frozen,
            latents,
            cond,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    def decode(self, latents: jax.Array, height: int, width: int) -> jax.Array:
        """Decode packed latents [B, N, 4C] to an image [B, height, width, 3] in [0, 1], not clipped."""
        grid = (height // self.model.size_multiple, width // self.model.size_multiple)
        return self._decode(self._loaded.frozen, latents, grid=grid)

    def _compute_velocity(self, weights, frozen, latents, t, cond, *, guidance_scale):
        gates, _ = self.model.gates(weights, cond, panel=slice(None))
        return self.model.velocity(
            weights, frozen, latents, t, cond, adapter=Adapter(gates), guidance_scale=guidance_scale
        )

    def _run_sampler(self, weights, frozen, latents, cond, *, num_inference_steps, guidance_scale):
        times = self.schedule.sampling_times(num_inference_steps, latents.shape[1])
        velocity = partial(self._compute_velocity, weights, frozen, guidance_scale=guidance_scale)
        return sample_euler(lambda x, t: velocity(x, t, cond), latents, times)
