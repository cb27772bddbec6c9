"""What packs hold of panels beside them: latents and image tokens, as a train step would make them."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ra_jax.data.images import Size
from ra_jax.data.loader import check_buckets, parse_buckets
from ra_jax.data.packs import Encoding
from ra_jax.data.panels import Panels
from ra_jax.inference.sampling import as_diptych, diptych_mask
from ra_jax.models.fill_model import masked
from ra_jax.models.loading import load_encoders


class PanelEncoder:
    """`pack_writer.Encoder` of a FLUX.1-Fill's VAE and a FLUX.1-Redux.

    Raises:
        WeightError: weights that cannot be had.
        DataError: buckets that cannot be read, or that the VAE's factor does not divide.
    """

    buckets: tuple[Size, ...]

    def __init__(self, fill: str, redux: str, *, aspect_ratio_buckets: str, mixed_precision: str):
        self.buckets = parse_buckets(aspect_ratio_buckets)
        encoders = load_encoders(fill, redux, dtype=jnp.bfloat16 if mixed_precision == "bf16" else jnp.float32)
        check_buckets(self.buckets, encoders.model.multiple)
        self.encoding = Encoding(encoders.fingerprint, aspect_ratio_buckets, mixed_precision)
        self._frozen, self._preprocess = encoders.frozen, encoders.preprocess

        @jax.jit
        def condition(frozen, batch):
            seen = masked(as_diptych(batch, "source"), diptych_mask(batch))
            return encoders.model.encode(frozen, seen)[0], encoders.model.image_tokens(frozen, batch["redux_pixels"])[0]

        @jax.jit
        def result(frozen, batch):
            return encoders.model.encode(frozen, as_diptych(batch, "result"))[0]

        self._condition, self._result = condition, result

    def condition(self, panels: Panels) -> dict[str, np.ndarray]:
        """masked_latents [N, 4C] float32 and image_tokens [T, D] of a condition."""
        pixels = np.asarray(self._preprocess(Image.fromarray(panels.reference)), np.float32)
        batch = _batch(panels, "source", "mask", "reference") | {"redux_pixels": jnp.asarray(pixels)[None]}
        latents, tokens = self._condition(self._frozen, batch)
        return {"masked_latents": np.asarray(latents), "image_tokens": np.asarray(tokens)}

    def result(self, panels: Panels) -> dict[str, np.ndarray]:
        """result_latents [N, 4C] float32 of a record."""
        return {"result_latents": np.asarray(self._result(self._frozen, _batch(panels, "result", "reference")))}


def _batch(panels: Panels, *names: str) -> dict[str, jax.Array]:
    """A batch of one."""
    return {name: jnp.asarray(getattr(panels, name))[None] for name in names}
