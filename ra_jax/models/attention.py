"""Attention behind one function, so that a kernel for one kind of chip is a change in one place."""

import jax

# XLA's own fusion runs everywhere; "cudnn" is the fused kernel of NVIDIA cards (bfloat16, head_dim <= 128).
IMPLEMENTATIONS = {"auto": "xla", "xla": "xla", "cudnn": "cudnn"}


def check_implementation(implementation: str) -> str:
    """Return `implementation` if it is a known name.

    Raises:
        ValueError: names the known ones.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention {implementation!r} is unknown: expected one of {', '.join(IMPLEMENTATIONS)}."
        )
    return implementation


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """softmax(q kᵀ / √D) v, unmasked, with the softmax in float32 whatever the inputs' type.

    Args:
        q: [B, S, H, D] queries.
        k: [B, T, H, D] keys.
        v: [B, T, H, D] values.
        implementation: one of `IMPLEMENTATIONS`.

    Returns:
        [B, S, H, D] in the type of `q`.

    Raises:
        ValueError: if `implementation` is unknown.
    """
    implementation = IMPLEMENTATIONS[check_implementation(implementation)]
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
