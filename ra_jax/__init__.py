"""ra_jax: removes objects from photos with a mixture of LoRA experts on FLUX.1-Fill, trained in JAX."""

from typing import TYPE_CHECKING

from ra_jax.moved import install_old_paths
from ra_jax.version import __version__
from ra_jax.xla_flags import compile_exact_products

if TYPE_CHECKING:
    from ra_jax.pipeline import RemovalPipeline

__all__ = ["RemovalPipeline", "__version__"]

compile_exact_products()
install_old_paths()


def __getattr__(name: str):
    # Imported on first access, because the data commands must not import JAX.
    if name != "RemovalPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ra_jax.pipeline import RemovalPipeline

    return RemovalPipeline
