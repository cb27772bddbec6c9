"""From three scores to one reward."""

import numpy as np

from ra_jax.rl.rewards import SCORES, total_reward


def test_scores_are_mapped_to_signs_weighed_and_summed():
    assert SCORES == ("removal", "background", "smoothness")
    scores = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 0.25, 0.5], [0.1, 0.9, 0.0]])
    by_hand = [1.0, -1.0, 0.0, 0.4 - 0.15, 0.4 * -0.8 + 0.3 * 0.8 - 0.3]
    np.testing.assert_allclose(total_reward(scores, (0.4, 0.3, 0.3)), by_hand, atol=1e-6)


def test_weights_need_not_sum_to_one():
    np.testing.assert_allclose(total_reward(np.array([1.0, 0.0, 0.75]), (2.0, 0.5, 1.0)), 2.0 - 0.5 + 0.5, atol=1e-6)
