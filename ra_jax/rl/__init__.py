"""Reinforcement from scores, as pure functions of arrays: advantages, policy estimators, losses."""
