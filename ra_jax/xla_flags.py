"""XLA's flags for every program of the process, set when `ra_jax` is imported."""

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
    """Whether this jaxlib is one whose CPU compiler needs the setting."""
    return jaxlib.__version__.startswith("0.10.")


def compile_exact_products(environ: MutableMapping[str, str] = os.environ) -> None:
    """Add to XLA_FLAGS what the CPU compiler of jaxlib 0.10 needs to return right numbers.

    jaxlib 0.10.2 fuses products with their surroundings and leaves them to YNNPACK; some of these fusions are wrong.
    At some shapes `jit` of mean((h @ (W + a @ b))², -1) is off by a tenth (h [128, 256], W [256, 256], rank 16), and of
    mean((silu(h @ (W + a @ b)) @ (V + c @ d) - x)², -1) by a third (h [512, 256], W [256, 256], V [256, 64], rank 16).
    Fusions of single products are right, and they leave sums over an axis of three to XLA, which takes a tenth of
    YNNPACK's time for them. 0.10.0 and 0.10.1 return the same numbers with the flag and without; 0.11.0 to 0.12.0.1
    are right without it.

    The environment is the only way that reaches every program: this package's, Flax's, and those of a user's own code.
    XLA reads it once, when JAX starts its backends. A flag that it does not know aborts the process, so newer jaxlibs,
    which may drop this one, are left alone. Processes that this one starts inherit it; 0.12.0.1 still knows it.

    A value that the user chose stays. A file that XLA_FLAGS names is replaced by its text, since XLA takes either flags
    or a file. Warns where JAX has started already and computes on the CPU: options of this package's own programs would
    not reach those that a user compiles from its functions.
    """
    if not needs_exact_products():
        return
    flags = environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):
        try:
            flags = Path(flags).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return  # XLA names the file itself, where it is used
    if FUSION_TYPE in flags:
        return
    # JAX has no public question for this. It must not be imported here: the data commands do without.
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        # XLA_FLAGS stay as they are: they are part of the keys of JAX's compilation cache, which would keep programs
        # that were compiled without the flag for processes that have it.
        if bridge.default_backend() == "cpu":
            warnings.warn(
                f"JAX was in use before ra_jax was imported. On the CPU jaxlib {jaxlib.__version__} then compiles some "
                "chains of matrix products into programs that return wrong numbers. Import ra_jax before the first "
                f"computation, or start Python with XLA_FLAGS={EXACT_PRODUCTS}",
                RuntimeWarning,
                stacklevel=3,
            )
        return
    environ["XLA_FLAGS"] = f"{flags} {EXACT_PRODUCTS}".strip()


def exact_options(platform: str) -> dict[str, str]:
    """The same as options of one program for such devices, for programs that have to be exact whatever XLA_FLAGS hold.

    The train step passes them: JAX may have been in use before `ra_jax` was imported, or XLA_FLAGS assigned after it.
    """
    return {FUSION_TYPE.removeprefix("--"): FUSIONS} if needs_exact_products() and platform == "cpu" else {}
