"""`RemovalPipeline`: removes objects from photos with FLUX.1-Fill and trained experts."""

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

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
PANEL_AREA = 512 * 512  # pixels of the panel a photo is edited in, unless the experts were trained on larger ones


@dataclass(frozen=True)
class RemovalOutput:
    """images: PIL, of the photo's size; gates: the experts' weights, float32 [num_images, num_experts], or None."""

    images: list[Image.Image]
    gates: np.ndarray | None


class RemovalPipeline:
    """A base with, where given, trained experts; made by `from_pretrained`.

    `pipe(image, mask)` edits photos. `condition`, `redux`, `velocity`, `denoise` and `decode` are its steps on arrays
    of one panel, comparable with diffusers' FluxFillPipeline number for number.
    """

    def __init__(self, loaded: LoadedModel, schedule: FlowSchedule, weights: Weights, panel_area: int = PANEL_AREA):
        self.model, self.schedule = loaded.model, schedule
        self._loaded, self._weights, self._panel_area = loaded, weights, panel_area
        self._remover = lru_cache(maxsize=4)(
            lambda steps, guidance: make_remover(
                loaded.model, schedule, num_inference_steps=steps, guidance_scale=guidance
            )
        )
        self._velocity = jax.jit(self._panel_velocity)
        self._denoise = jax.jit(self._panel_denoise, static_argnames="num_inference_steps")
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
        """Load FLUX.1-Fill (`fill`) and FLUX.1-Redux (`redux`), folders or hub ids.

        experts: a run's output folder or one of its checkpoints; its averaged weights are taken where it has any.
        dtype: of the matmuls, "bfloat16" or "float32"; max_sequence_length: prompt tokens, by default the experts'
        own, else training's default. Raises WeightError or CheckpointError where they cannot be had or do not belong
        together.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)} (float16 overflows in FLUX)")
        checkpoint = None if experts is None else find_checkpoint(experts)
        about = None if checkpoint is None else read_metadata(checkpoint)
        config = None if about is None else from_checkpoint(about.config)
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
        check_base(checkpoint, about, loaded.fingerprint)
        prefix = "ema" if config.optimization.ema_decay else "trainable"
        weights = restore(checkpoint, loaded.trainable, prefix=prefix)
        area = max(height * width for height, width in parse_buckets(config.data.aspect_ratio_buckets))
        return cls(loaded, schedule, weights, area)

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
        """Remove what `mask` covers (> 127; soft edges blend softly) from `image`.

        A window around the mask is edited beside the reference (`ref`, or the object itself on white) and blended
        back: pixels beyond the feathered mask are the image's own, bit for bit. Image i starts from noise of
        (seed, i), or from latents[i], the packed noise [num_images, N, 4C] of the diptych. Raises ValueError for a
        mask that is empty or of another size, and for latents of another shape.
        """
        photo, coverage = np.asarray(upright_rgb(image)), soft_mask(mask)
        if coverage.shape != photo.shape[:2]:
            raise ValueError(
                f"mask of {coverage.shape[::-1]} for an image of {photo.shape[1::-1]}: expected equal sizes (width, "
                "height) once both are upright"
            )
        if num_images < 1:
            raise ValueError(f"num_images={num_images}: expected at least 1")
        multiple = self.model.multiple
        crop = plan_crop(coverage, panel_sizes(self._panel_area, multiple), multiple=multiple)
        given = None if ref is None else np.asarray(upright_rgb(ref))
        panels = {
            "source": crop.photo(photo),
            "mask": crop.mask(coverage),
            "reference": crop.reference(given, photo, coverage),
        }
        if self._loaded.preprocess is not None:
            panels["redux_pixels"] = self._loaded.preprocess(Image.fromarray(panels["reference"]))
        if latents is None:
            keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(num_images))
            latents = initial_noise(self.model, keys, *crop.size)
        height, width = crop.size
        expected = (num_images, 2 * height * width // multiple**2, self.model.latent_features)
        if latents.shape != expected:
            raise ValueError(
                f"latents of shape {latents.shape}: expected {expected}, the packed noise [num_images, N, 4C] of a "
                f"diptych of panels of {height} × {width} pixels, in which this photo is edited"
            )
        batch = {name: np.repeat(panel[None], num_images, 0) for name, panel in panels.items()}
        remove = self._remover(num_inference_steps, float(guidance_scale))
        edited, gates = remove(self._weights, self._loaded.frozen, batch, jnp.asarray(latents, jnp.float32))
        images = [Image.fromarray(paste(photo, panel, coverage, crop)) for panel in np.asarray(edited)]
        return RemovalOutput(images, None if gates is None else np.asarray(gates))

    def condition(
        self,
        image: jax.Array,
        mask: jax.Array,
        context: jax.Array | None = None,
        *,
        masked_latents: jax.Array | None = None,
    ) -> Condition:
        """Fill channels [B, N, 4C + 4f²], context [B, S, joint_dim] and pooled [B, P] of filling mask in image.

        image: [B, H, W, 3] in [0, 1]; mask: [B, H, W], ≥ 0.5 = fill; context: replaces the empty prompt (append
        `redux` tokens there); masked_latents: [B, N, 4C], packed and standardised, replaces the masked image's
        encoding (diffusers samples it, here the mean is taken).
        """
        binary = (jnp.asarray(mask) >= 0.5).astype(jnp.float32)
        return self._condition(
            self._loaded.frozen, jnp.asarray(image), binary, text=context, masked_latents=masked_latents
        )

    def redux(self, pixels: jax.Array) -> jax.Array:
        """Image tokens [B, T, joint_dim] of preprocessed pixels [B, h, w, 3]."""
        if self.model.redux is None:
            raise ValueError("this pipeline has no Redux: give from_pretrained(..., redux=FOLDER)")
        return self._image_tokens(self._loaded.frozen, pixels)

    def velocity(self, latents: jax.Array, t: jax.Array, cond: Condition, guidance_scale: float = 30.0) -> jax.Array:
        """v_θ(x_t, t, c) [B, N, 4C], float32; t [B] in (0, 1]. Experts, where loaded, are mixed by the router."""
        return self._velocity(self._weights, self._loaded.frozen, latents, t, cond, guidance_scale=guidance_scale)

    def denoise(
        self, latents: jax.Array, cond: Condition, num_inference_steps: int = 28, guidance_scale: float = 30.0
    ) -> jax.Array:
        """Final packed latents [B, N, 4C] of the Euler sampler, from noise [B, N, 4C]."""
        return self._denoise(
            self._weights,
            self._loaded.frozen,
            latents,
            cond,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    def decode(self, latents: jax.Array, height: int, width: int) -> jax.Array:
        """Image [B, height, width, 3] in [0, 1], not clipped, of packed latents [B, N, 4C]."""
        grid = (height // self.model.multiple, width // self.model.multiple)
        return self._decode(self._loaded.frozen, latents, grid=grid)

    def _panel_velocity(self, weights, frozen, latents, t, cond, *, guidance_scale):
        gates, _ = self.model.gates(weights, cond, panel=slice(None))
        return self.model.velocity(
            weights, frozen, latents, t, cond, adapter=Adapter(gates), guidance_scale=guidance_scale
        )

    def _panel_denoise(self, weights, frozen, latents, cond, *, num_inference_steps, guidance_scale):
        times = self.schedule.sampling_times(num_inference_steps, latents.shape[1])
        velocity = partial(self._panel_velocity, weights, frozen, guidance_scale=guidance_scale)
        return sample_euler(lambda x, t: velocity(x, t, cond), latents, times)
