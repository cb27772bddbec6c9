"""Reinforcement learning from scores: advantages, policy estimators and losses, as pure functions of arrays."""
