"""Times for sampling and training, shifted by resolution as in FLUX (Esser et al. 2403.03206, eq. 23)."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.errors import WeightError

# Diffusers' defaults for keys that are absent from scheduler_config.json. Only the defaults that differ from FLUX's
# values are listed.
DIFFUSERS_DEFAULTS = {"shift": 1.0, "use_dynamic_shifting": False}
# Settings of diffusers' scheduler that change its times or steps. FLUX uses these values, and no others are supported.
FIXED_SETTINGS = {
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}


@dataclass(frozen=True)
class FlowSchedule:
    """The settings of diffusers' FlowMatchEulerDiscreteScheduler that FLUX uses. They define how times are shifted.

        with dynamic shifting        t' = e^μ / (e^μ + 1/t − 1)
        without dynamic shifting     t' = s·t / (1 + (s − 1)·t)        s = `shift`

    μ is linear in the number of image tokens. It is `base_shift` at `base_image_seq_len` tokens and `max_shift` at
    `max_image_seq_len` tokens, and is extrapolated outside of this range.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift: float = 3.0
    use_dynamic_shifting: bool = True

    @classmethod
    def from_folder(cls, folder: str | Path) -> "FlowSchedule":
        """Read `scheduler/scheduler_config.json` in a diffusers folder, or use FLUX's values if there is no such file.

        Raises:
            WeightError: if the file has a setting that FLUX does not use (`FIXED_SETTINGS`).
        """
        path = Path(folder) / "scheduler" / "scheduler_config.json"
        if not path.exists():
            return cls()
        settings = DIFFUSERS_DEFAULTS | json.loads(path.read_text())
        for name, value in FIXED_SETTINGS.items():
            if settings.get(name, value) != value:
                raise WeightError(f"{path}: {name} is {settings[name]!r}, but only {value!r} is supported.")
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})

    def mu(self, tokens: int) -> float:
        """Compute μ for an image of `tokens` packed tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (tokens - self.base_image_seq_len)

    def shift_times(self, t, tokens: int):
        """Shift times in (0, 1] towards noise; t = 1 stays 1. Works for NumPy and JAX arrays."""
        if self.use_dynamic_shifting:
            scale = float(np.exp(self.mu(tokens)))
            return scale / (scale + 1.0 / t - 1.0)
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def sampling_times(self, steps: int, tokens: int) -> np.ndarray:
        """Compute the decreasing times of a sampler from 1 to 0, [steps + 1] float32.

        Raises:
            ValueError: if `steps` is less than 1.
        """
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps}: a sampler needs at least 1 step")
        times = self.shift_times(np.linspace(1.0, 1.0 / steps, steps), tokens)
        return np.append(times, 0.0).astype(np.float32)

    def draw_training_time(self, key: jax.Array, tokens: int) -> jax.Array:
        """Draw a shifted logit-normal time: t = shift_times(σ(n)), n ~ N(0, 1); a float32 scalar in (0, 1)."""
        return self.shift_times(jax.nn.sigmoid(jax.random.normal(key, (), jnp.float32)), tokens)

    def training_density(self, t: np.ndarray, tokens: int) -> np.ndarray:
        """Compute the probability density of `draw_training_time` at times t in (0, 1).

        Shifting adds a constant m to logit(t), which is μ, or log `shift` without dynamic shifting. t is therefore
        logit-normal: p(t) = φ(logit(t) − m)/(t·(1 − t)) with the standard normal density φ.
        """
        offset = self.mu(tokens) if self.use_dynamic_shifting else np.log(self.shift)
        logit = np.log(t / (1.0 - t))
        return np.exp(-0.5 * (logit - offset) ** 2) / np.sqrt(2.0 * np.pi) / (t * (1.0 - t))


def stratified_times(key: jax.Array, count: int, fraction: float) -> jax.Array:
    """Draw `count` decreasing times [count] from the noisiest `fraction` of [0, 1].

    This part of [0, 1] is divided into `count` equal intervals, and one time is drawn uniformly from each:

        t_k = 1 − fraction·(k + u_k)/count        u_k ~ U(0, 1)
    """
    offsets = jax.random.uniform(key, (count,), jnp.float32)
    return 1.0 - fraction * (jnp.arange(count) + offsets) / count
