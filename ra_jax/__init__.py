"""ra_jax: a mixture of LoRA experts on FLUX.1-Fill, trained from scored removals in JAX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ra_jax.pipeline import RemovalPipeline

__all__ = ["RemovalPipeline"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # Late: the data commands need no JAX.
    if name != "RemovalPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ra_jax.pipeline import RemovalPipeline

    return RemovalPipeline
