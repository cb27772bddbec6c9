"""Compares advantages and sample weights with values computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.rl.advantages import group_advantages, human_advantages, sample_weights, zero_std_groups

WEIGHTS = (0.4, 0.3, 0.3)


def make_scores(*removal):
    """Return scores [R, 3] with the given removal scores; background and smoothness are 0.5."""
    return np.stack([removal, *[np.full(len(removal), 0.5)] * 2], axis=1)


def test_advantages_are_residuals_divided_by_the_unbiased_pooled_std():
    # Residuals ∓0.2 and −0.1, −0.1, 0.2: their squares sum to 0.14. 5 records in 2 groups leave 3 degrees of freedom.
    scores = make_scores(0.2, 0.6, 0.5, 0.5, 0.8)
    pooled = np.sqrt(0.14 / 3)
    expected = 0.4 * np.array([-0.2, 0.2, -0.1, -0.1, 0.2]) / pooled
    advantages = human_advantages(scores, np.array([0, 0, 1, 1, 1]), WEIGHTS)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, expected, rtol=1e-5)


def test_each_score_is_standardized_separately_and_weighted():
    # Two groups of two records leave 2 degrees of freedom. Residuals by score: ±0.1 and ±0.1, ±0.2 and 0, 0 and ±0.3.
    scores = np.array([[0.4, 0.7, 0.5], [0.6, 0.3, 0.5], [0.7, 0.5, 0.9], [0.5, 0.5, 0.3]])
    a, b, c = 0.1 / np.sqrt(0.04 / 2), 0.2 / np.sqrt(0.08 / 2), 0.3 / np.sqrt(0.18 / 2)
    expected = [-0.5 * a + 0.2 * b, 0.5 * a - 0.2 * b, 0.5 * a + 0.3 * c, -0.5 * a - 0.3 * c]
    advantages = human_advantages(scores, np.array([0, 0, 1, 1]), (0.5, 0.2, 0.3))
    np.testing.assert_allclose(advantages, expected, rtol=1e-5)


def test_records_of_a_group_need_not_be_adjacent():
    scores = np.random.default_rng(0).uniform(size=(6, 3))
    groups, order = np.array([0, 0, 1, 1, 2, 2]), np.array([4, 0, 2, 5, 3, 1])
    shuffled = human_advantages(scores[order], groups[order], WEIGHTS)
    np.testing.assert_allclose(shuffled, human_advantages(scores, groups, WEIGHTS)[order], rtol=1e-6)


def test_a_group_of_one_is_centered_on_the_data_set_and_takes_no_degree_of_freedom():
    # The pair leaves 1 degree of freedom, so the pooled std is √(0.08/1). The mean of the data set is 0.5.
    scores = make_scores(0.2, 0.6, 0.7)
    expected = 0.4 * np.array([-0.2, 0.2, 0.2]) / np.sqrt(0.08)
    np.testing.assert_allclose(human_advantages(scores, np.array([0, 0, 1]), WEIGHTS), expected, rtol=1e-5)


def test_groups_of_one_without_larger_groups_are_standardized_over_the_data_set():
    scores = make_scores(0.2, 0.6, 0.7)
    expected = 0.4 * (scores[:, 0] - 0.5) / scores[:, 0].std()
    np.testing.assert_allclose(human_advantages(scores, np.arange(3), WEIGHTS), expected, rtol=1e-5)


def test_a_pooled_std_below_the_floor_is_replaced_by_the_floor():
    advantages = human_advantages(make_scores(0.500, 0.506), np.array([0, 0]), WEIGHTS)  # pooled std 0.0042
    np.testing.assert_allclose(advantages, 0.4 * np.array([-0.003, 0.003]) / 0.02, rtol=1e-4)


def test_each_score_is_clipped_at_five_standard_deviations():
    removal = np.full(80, 0.5)
    removal[0] = 1.0
    groups = np.repeat(np.arange(20), 4)
    residual = np.array([0.375, -0.125, -0.125, -0.125])
    pooled = np.sqrt((residual**2).sum() / 60)
    assert residual[0] / pooled > 5
    removal[4:] += np.tile([0.001, -0.001], 38)  # gives every other group a std above 0
    advantages = human_advantages(make_scores(*removal), groups, WEIGHTS)
    assert advantages[0] == pytest.approx(0.4 * 5)
    np.testing.assert_allclose(advantages[1:4], 0.4 * -0.125 / pooled, rtol=1e-3)
    lowest = human_advantages(1 - make_scores(*removal), groups, WEIGHTS)
    assert lowest[0] == pytest.approx(0.4 * -5)


def test_a_group_of_equal_rewards_has_advantages_of_zero():
    # Group 0: scores differ, but total rewards are equal (0.3·0.4 − 0.4·0.3 = 0). Group 1: rewards differ. Group 2: one
    # record.
    scores = np.array([[0.5, 0.5, 0.5], [0.8, 0.1, 0.5], [0.5, 0.5, 0.5], [0.6, 0.5, 0.5], [0.5, 0.5, 0.5]])
    groups = np.array([0, 0, 1, 1, 2])
    rewards = (2 * scores - 1) @ np.array(WEIGHTS)
    assert zero_std_groups(rewards, groups).tolist() == [True, True, False, False, False]
    advantages = human_advantages(scores, groups, WEIGHTS)
    assert (advantages[:2] == 0).all()
    assert (advantages[2:4] != 0).all()
    assert advantages[4] != 0


def test_a_reward_std_below_a_thousandth_counts_as_zero():
    groups = np.array([0, 0, 1, 1])
    assert zero_std_groups(np.array([0.0, 0.0018, 0.0, 0.0022]), groups).tolist() == [True, True, False, False]


REWARDS, GROUPS = np.array([0.5, -0.2, 0.1, 0.3, 0.3, -1.0]), np.array([0, 0, 0, 1, 1, 2])


def test_sample_weights_none_are_one():
    np.testing.assert_array_equal(sample_weights(REWARDS, GROUPS, "none"), np.ones(6, np.float32))


def test_sample_weights_by_score_are_rewards_mapped_to_zero_to_one():
    mapped = np.array([0.75, 0.4, 0.55, 0.65, 0.65, 0.0])
    np.testing.assert_allclose(sample_weights(REWARDS, GROUPS, "score"), mapped / 0.5, rtol=1e-6)
    wider = sample_weights(2 * REWARDS, GROUPS, "score", limit=2.0)  # score weights that sum to 2
    np.testing.assert_allclose(wider, mapped / 0.5, rtol=1e-6)


def test_sample_weights_best_select_one_record_per_group():
    # The first of two equal records in group 1, and the only record of group 2: 3 of 6 records, so their weight is 2.
    np.testing.assert_allclose(sample_weights(REWARDS, GROUPS, "best"), [2, 0, 0, 2, 0, 2])


def test_sample_weights_softmax_have_the_same_sum_in_every_group():
    weights = sample_weights(REWARDS, GROUPS, "softmax", temperature=0.2)
    first = np.exp(np.array([0.5, -0.2, 0.1]) / 0.2)
    expected = np.array([*first / first.sum(), 0.5, 0.5, 1.0]) * 6 / 3
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    np.testing.assert_allclose(np.bincount(GROUPS, weights), [2, 2, 2], rtol=1e-5)


def test_softmax_weights_of_a_group_with_low_rewards_are_finite():
    weights = sample_weights(np.array([1.0, 0.9, -0.99, -1.0]), np.array([0, 0, 1, 1]), "softmax", temperature=1e-3)
    low = 1 / (1 + np.exp(-10))
    np.testing.assert_allclose(weights, 2 * np.array([1, 0, low, 1 - low]), atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "score", "softmax", "best"])
def test_sample_weights_have_mean_one(kind):
    rng = np.random.default_rng(0)
    weights = sample_weights(rng.uniform(-1, 1, 40), rng.permutation(np.repeat(np.arange(10), 4)), kind)
    assert weights.dtype == np.float32
    assert weights.min() >= 0
    assert weights.mean() == pytest.approx(1, abs=1e-6)


def test_wrong_weightings_and_zero_weights_are_refused():
    with pytest.raises(ValueError, match="base_loss_weighting='worst': expected one of none, score, softmax, best"):
        sample_weights(REWARDS, GROUPS, "worst")
    with pytest.raises(ValueError, match="base_loss_weighting='score' gives every record weight 0"):
        sample_weights(np.full(3, -1.0), np.arange(3), "score")


def test_group_advantages_compare_the_rollouts_of_a_group_separately_for_each_score():
    """Compares with a loop over groups and scores.

    One group has nearly equal rewards. Another group has a score with a std below the floor.
    """
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=(6, 4, 3)).astype(np.float32)
    scores[:, 1] = 0.5 + 1e-5 * rng.normal(size=(6, 3))  # nearly equal: std below 1e-3
    scores[:, 2, 0] = 0.3 + 0.005 * rng.normal(size=6)  # std below the floor of 0.02
    scores[:, 3, 1] = np.where(np.arange(6) == 0, 1.0, 0.0)
    weights = np.asarray([0.4, 0.3, 0.3])
    advantages, reward_std = group_advantages(jnp.asarray(scores), weights)
    for group in range(4):
        total = (2 * scores[:, group] - 1) @ weights
        assert float(reward_std[group]) == pytest.approx(total.std(), rel=1e-3, abs=1e-6)
        expected = np.zeros(6)
        for i in range(3):
            values = scores[:, group, i].astype(np.float64)
            expected += weights[i] * np.clip((values - values.mean()) / max(values.std(), 0.02), -5, 5)
        np.testing.assert_allclose(advantages[:, group], expected if total.std() >= 1e-3 else 0.0, atol=1e-4)
    assert not np.any(advantages[:, 1])
    better, same_std = group_advantages(jnp.asarray(scores), weights, drop_negative=True)
    np.testing.assert_array_equal(better, np.maximum(advantages, 0.0))
    np.testing.assert_array_equal(same_std, reward_std)
    assert (better > 0).any() and (advantages < 0).any()
