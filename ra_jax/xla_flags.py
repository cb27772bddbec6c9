"""XLA flags for all programs of the process. They are set when `ra_jax` is imported."""

import os
import sys
import warnings
from collections.abc import MutableMapping
from pathlib import Path

import jaxlib

FUSION_TYPE = "--xla_cpu_experimental_ynn_fusion_type"
SINGLE_PRODUCTS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
EXACT_PRODUCTS = f"{FUSION_TYPE}={SINGLE_PRODUCTS}"


def needs_exact_products() -> bool:
    """Return whether the CPU compiler of the installed jaxlib needs the flag `EXACT_PRODUCTS`."""
    return jaxlib.__version__.startswith("0.10.")


def compile_exact_products(environ: MutableMapping[str, str] = os.environ) -> None:
    """Add the flag `EXACT_PRODUCTS` to XLA_FLAGS, so that jaxlib 0.10 computes right numbers on the CPU.

    jaxlib 0.10.2 fuses matrix products with the operations around them, and the library YNNPACK runs the fusions. Some
    of these fusions compute wrong numbers. At some shapes, `jit` of mean((h @ (W + a @ b))², -1) is wrong by a tenth
    (h [128, 256], W [256, 256], rank 16), and `jit` of mean((silu(h @ (W + a @ b)) @ (V + c @ d) - x)², -1) is wrong by
    a third (h [512, 256], W [256, 256], V [256, 64], rank 16).

    With the flag, YNNPACK runs only fusions of single products, which are right. XLA itself then computes sums over an
    axis of size three, in a tenth of the time that YNNPACK takes. jaxlib 0.10.0 and 0.10.1 return the same numbers with
    and without the flag. jaxlib 0.11.0 to 0.12.0.1 return right numbers without it.

    Only the environment variable applies to all programs: to programs of this package, of Flax and of the user. XLA
    reads it once, when JAX initializes its backends. XLA aborts the process on an unknown flag. Therefore the flag is
    not set for newer versions of jaxlib, which may drop it. Child processes inherit the variable; jaxlib 0.12.0.1 still
    accepts the flag.

    If the user has set the flag to another value, this value is kept. If XLA_FLAGS names a file, the text of the file
    replaces the name, because XLA accepts either flags or a file.

    Warns if JAX is already initialized on the CPU, because the variable then has no effect. This package compiles its
    own programs with the flag as a compiler option (`exact_options`), but programs that a user compiles from functions
    of this package do not get this option.
    """
    if not needs_exact_products():
        return
    flags = environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):
        try:
            flags = Path(flags).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return  # XLA reports the unreadable file itself
    if FUSION_TYPE in flags:
        return
    # JAX has no public function to ask whether its backends are initialized. `sys.modules` is read here, because the
    # data commands must not import JAX.
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        # XLA_FLAGS must not change now: they are part of the key of JAX's compilation cache. The cache would store
        # programs that were compiled without the flag under the key of processes that have it.
        if bridge.default_backend() == "cpu":
            warnings.warn(
                f"JAX was in use before ra_jax was imported. Therefore jaxlib {jaxlib.__version__} compiles some "
                "chains of matrix products to CPU programs that return wrong numbers. Import ra_jax before the first "
                f"JAX computation, or start Python with XLA_FLAGS={EXACT_PRODUCTS}",
                RuntimeWarning,
                stacklevel=3,
            )
        return
    environ["XLA_FLAGS"] = f"{flags} {EXACT_PRODUCTS}".strip()


def exact_options(platform: str) -> dict[str, str]:
    """Return the flag as compiler options of a single program for devices of `platform`; empty if it is not needed.

    The train step is compiled with these options, so that its numbers are right for any XLA_FLAGS. JAX may have been
    initialized before `ra_jax` was imported, or XLA_FLAGS may have been changed after the import.
    """
    return {FUSION_TYPE.removeprefix("--"): SINGLE_PRODUCTS} if needs_exact_products() and platform == "cpu" else {}
