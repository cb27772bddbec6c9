"""Rewards of generated images: a registry, the rewards of removal, the user's own."""

import ra_jax.rewards.removal  # noqa: F401 (registers its rewards)
