"""Time steps for sampling and for training, with FLUX's shift for the resolution (Esser et al. 2403.03206, eq. 23)."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.errors import WeightError

# What diffusers takes for a value that scheduler_config.json leaves out, where FLUX's own differs from it.
ABSENT = {"shift": 1.0, "use_dynamic_shifting": False}
# Values of diffusers' scheduler that change its times or steps and that FLUX leaves as they are.
FIXED = {
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
    """The parts of diffusers' FlowMatchEulerDiscreteScheduler configuration that FLUX uses.

    With dynamic shifting, time is warped by t' = e^μ / (e^μ + 1/t − 1), where μ is linear in the number of image
    tokens from `base_shift` at `base_image_seq_len` to `max_shift` at `max_image_seq_len` (and beyond them);
    without it by t' = s·t / (1 + (s − 1)·t) with s = `shift`.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift: float = 3.0
    use_dynamic_shifting: bool = True

    @classmethod
    def from_folder(cls, folder: str | Path) -> "FlowSchedule":
        """Read `scheduler/scheduler_config.json` of a diffusers folder; FLUX's own values where there is none.

        Raises WeightError for a kind of schedule that FLUX does not use.
        """
        path = Path(folder) / "scheduler" / "scheduler_config.json"
        if not path.exists():
            return cls()
        given = ABSENT | json.loads(path.read_text())
        for name, value in FIXED.items():
            if given.get(name, value) != value:
                raise WeightError(f"{path}: {name} is {given[name]!r}, only {value!r} is known.")
        return cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given})

    def mu(self, tokens: int) -> float:
        """μ for an image of `tokens` packed tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (tokens - self.base_image_seq_len)

    def warp(self, t, tokens: int):
        """Shift times in (0, 1] towards noise; keeps 1 where it is. Works on NumPy and JAX arrays."""
        if self.use_dynamic_shifting:
            scale = float(np.exp(self.mu(tokens)))
            return scale / (scale + 1.0 / t - 1.0)
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def sampling_times(self, steps: int, tokens: int) -> np.ndarray:
        """The `steps` + 1 decreasing times of a sampler, [steps + 1] float32, from 1 to 0."""
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps}: a sampler needs at least 1 step")
        times = self.warp(np.linspace(1.0, 1.0 / steps, steps), tokens)
        return np.append(times, 0.0).astype(np.float32)

    def training_time(self, key: jax.Array, tokens: int) -> jax.Array:
        """One logit-normal time, shifted by the same μ: t = warp(σ(n)), n ~ N(0, 1); float32 in (0, 1)."""
        return self.warp(jax.nn.sigmoid(jax.random.normal(key, (), jnp.float32)), tokens)


def stratified_times(key: jax.Array, count: int, fraction: float) -> jax.Array:
    """`count` times, one uniform draw from each equal part of the noisiest `fraction` of [0, 1]: [count], decreasing.

    t_k = 1 − fraction·(k + u_k)/count,  u_k ~ U(0, 1).
    """
    offsets = jax.random.uniform(key, (count,), jnp.float32)
    return 1.0 - fraction * (jnp.arange(count) + offsets) / count
