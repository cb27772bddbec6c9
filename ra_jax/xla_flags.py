"""XLA flags for all programs of the process. They are set when `ra_jax` is imported."""

import os
import sys
import warnings
from collections.abc import MutableMapping
from pathlib import Path

import jaxlib

FUSION_TYPE = "--xla_cpu_experimental_ynn_fusion_type"
FUSIONS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
EXACT_PRODUCTS = f"{FUSION_TYPE}={FUSIONS}"


def needs_exact_products() -> bool:
    """Return whether the CPU compiler of the installed jaxlib needs the flag."""
    return jaxlib.__version__.startswith("0.10.")


def compile_exact_products(environ: MutableMapping[str, str] = os.environ) -> None:
    """Add the flag to XLA_FLAGS without which programs of jaxlib 0.10 return wrong numbers on the CPU.

    jaxlib 0.10.2 fuses matrix products with the operations around them and runs the fusions by YNNPACK. Some of these
    fusions compute wrong numbers. At some shapes, `jit` of mean((h @ (W + a @ b))², -1) is wrong by a tenth
    (h [128, 256], W [256, 256], rank 16), and `jit` of mean((silu(h @ (W + a @ b)) @ (V + c @ d) - x)², -1) is wrong by
    a third (h [512, 256], W [256, 256], V [256, 64], rank 16).

    With the flag, YNNPACK runs only fusions of single products, which are right. Sums over an axis of three then run by
    XLA, in a tenth of YNNPACK's time. jaxlib 0.10.0 and 0.10.1 return the same numbers with and without the flag.
    0.11.0 to 0.12.0.1 are right without it.

    Only the environment variable reaches all programs: those of this package, of Flax and of the user. XLA reads it
    once, when JAX initializes its backends. XLA aborts the process on an unknown flag. Therefore newer jaxlibs, which
    may drop the flag, do not get it. Child processes inherit the variable; jaxlib 0.12.0.1 still accepts the flag.

    A value of the flag that the user has set is kept. If XLA_FLAGS names a file, the text of the file takes its place,
    because XLA accepts either flags or a file.

    Warns if JAX is already initialized on the CPU. Then the variable has no effect, and compiler options of this
    package's programs (`exact_options`) do not reach programs that a user compiles from its functions.
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
    # JAX has no public function for this. `sys.modules` is read because the data commands must not import JAX.
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

    The train step is compiled with them, so that it is right whatever XLA_FLAGS are. JAX may have been initialized
    before `ra_jax` was imported, or XLA_FLAGS may have been changed after it.
    """
    return {FUSION_TYPE.removeprefix("--"): FUSIONS} if needs_exact_products() and platform == "cpu" else {}
