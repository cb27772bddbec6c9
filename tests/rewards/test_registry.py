"""Tests the registry of rewards, and the total reward of scores."""

import jax
import numpy as np
import pytest

from ra_jax.rewards import registry
from ra_jax.rewards.registry import REWARDS, SCORES, RewardInputs, default_rewards, register_reward, total_reward

WEIGHTS = (0.4, 0.3, 0.3)
GRAY = np.full((1, 32, 32, 3), 0.5, np.float32)


def test_total_reward_maps_scores_to_minus_1_to_1_and_sums_them_with_weights():
    assert SCORES == ("removal", "background", "smoothness")
    scores = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 0.25, 0.5], [0.1, 0.9, 0.0]])
    by_hand = [1.0, -1.0, 0.0, 0.4 - 0.15, 0.4 * -0.8 + 0.3 * 0.8 - 0.3]
    np.testing.assert_allclose(total_reward(scores, WEIGHTS), by_hand, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda s: total_reward(s, WEIGHTS))(scores), by_hand, atol=1e-6)


def test_weights_need_not_sum_to_one():
    np.testing.assert_allclose(total_reward(np.array([1.0, 0.0, 0.75]), (2.0, 0.5, 1.0)), 2.0 - 0.5 + 0.5, atol=1e-6)


def test_rewards_that_need_a_ground_truth_are_marked_and_refuse_to_run_without_one():
    names = {name for name, reward in REWARDS.items() if reward.needs_target}
    assert names == {"removal", "background", "lpips"}
    assert default_rewards(True) == SCORES
    assert default_rewards(False) == ("removal_without_target", "background_without_target", "smoothness")
    without_target = RewardInputs(GRAY, GRAY, np.zeros((1, 32, 32), np.float32))
    for name in names:
        with pytest.raises(ValueError, match=f"reward '{name}' needs a ground truth, but target is None"):
            REWARDS[name].function(without_target)


def test_a_reward_name_can_be_registered_only_once(monkeypatch):
    monkeypatch.setattr(registry, "REWARDS", dict(REWARDS))

    @register_reward("brightness", needs_target=False)
    def brightness(inputs):
        return inputs.image.mean((1, 2, 3))

    inputs = RewardInputs(0.6 * GRAY, GRAY, np.zeros((1, 32, 32), np.float32))
    np.testing.assert_allclose(registry.REWARDS["brightness"].function(inputs), [0.3], rtol=1e-5)
    with pytest.raises(ValueError, match="reward 'brightness' is already registered"):
        register_reward("brightness", needs_target=False)
