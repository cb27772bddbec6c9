"""The schema of a batch."""

import jax

Batch = dict[str, jax.Array]
