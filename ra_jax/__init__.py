"""ra_jax: a mixture of LoRA experts on FLUX.1-Fill, trained from scored removals in JAX."""

__version__ = "0.1.0"
