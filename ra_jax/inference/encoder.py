"""Encode panels for packs: compute the latents and image tokens that a train step would compute from the panels."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ra_jax.data.batch import Batch
from ra_jax.data.images import Size
from ra_jax.data.loader import check_buckets, parse_buckets
from ra_jax.data.packs import LatentEncoding
from ra_jax.data.panels import Panels
from ra_jax.inference.sampling import as_diptych, diptych_mask
from ra_jax.interop.diffusers import load_encoders
from ra_jax.models.fill_model import apply_mask, encode_image
from ra_jax.models.siglip import Redux
from ra_jax.models.vae import AutoencoderKL


class PanelEncoder:
    """Encodes panels with the VAE of FLUX.1-Fill and with FLUX.1-Redux, as a `pack_writer.Encoder`.

    Args:
        fill: folder or hub id of FLUX.1-Fill.
        redux: folder or hub id of FLUX.1-Redux.
        aspect_ratio_buckets: panel sizes, as in the training flag of this name.
        mixed_precision: "bf16" to compute the image tokens in bfloat16; any other value to compute them in float32.

    Attributes:
        buckets: the panel sizes (height, width).
        encoding: models and settings of the encoder, which the pack stores.

    Raises:
        WeightError: the weights could not be loaded.
        DataError: `aspect_ratio_buckets` is malformed, or a side is not a multiple of twice the VAE's factor.
    """

    buckets: tuple[Size, ...]

    def __init__(self, fill: str, redux: str, *, aspect_ratio_buckets: str, mixed_precision: str):
        self.buckets = parse_buckets(aspect_ratio_buckets)
        encoders = load_encoders(fill, redux, dtype=jnp.bfloat16 if mixed_precision == "bf16" else jnp.float32)
        check_buckets(self.buckets, 2 * encoders.vae.config.factor)
        self.encoding = LatentEncoding(encoders.fingerprint, aspect_ratio_buckets, mixed_precision)
        self._vae, self._redux, self._preprocess = encoders.vae, encoders.redux, encoders.preprocess

    def condition(self, panels: Panels) -> dict[str, np.ndarray]:
        """Encode a condition: masked_latents [N, 4C] float32 and image_tokens [T, D]."""
        pixels = np.asarray(self._preprocess(Image.fromarray(panels.reference)), np.float32)
        batch = _single_batch(panels, "source", "mask", "reference") | {"redux_pixels": jnp.asarray(pixels)[None]}
        latents, tokens = _encode_condition(self._vae, self._redux, batch)
        return {"masked_latents": np.asarray(latents), "image_tokens": np.asarray(tokens)}

    def result(self, panels: Panels) -> dict[str, np.ndarray]:
        """Encode the result of a record: result_latents [N, 4C] float32."""
        return {"result_latents": np.asarray(_encode_result(self._vae, _single_batch(panels, "result", "reference")))}


@jax.jit
def _encode_condition(vae: AutoencoderKL, redux: Redux, batch: Batch) -> tuple[jax.Array, jax.Array]:
    masked = apply_mask(as_diptych(batch, "source"), diptych_mask(batch))
    return encode_image(vae, masked)[0], redux(batch["redux_pixels"])[0]


@jax.jit
def _encode_result(vae: AutoencoderKL, batch: Batch) -> jax.Array:
    return encode_image(vae, as_diptych(batch, "result"))[0]


def _single_batch(panels: Panels, *names: str) -> dict[str, jax.Array]:
    """Return a batch of size 1 with the panels in `names`."""
    return {name: jnp.asarray(getattr(panels, name))[None] for name in names}
