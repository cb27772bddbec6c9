"""Rewards of generated images: the registry, the rewards for object removal, and user-defined rewards."""

import ra_jax.rewards.removal  # noqa: F401 (registers its rewards)
