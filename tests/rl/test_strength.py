"""The weights of the policy loss for a strength."""

from dataclasses import replace

import numpy as np
import pytest

from ra_jax.config.checks import LEAST_POLICY_WEIGHT
from ra_jax.rl.strength import (
    MAX_SHIFT,
    LossWeights,
    ScoreDeviations,
    choose_strength,
    policy_weights,
    share_pushed_away,
    strength_table,
    within_scenes,
)

GUIDE = LossWeights(base=1.0, policy=0.1, kl=0.0)


@pytest.mark.parametrize("weights", [(1.0, 0.1, 0.0), (0.5, 0.3, 0.0), (0.0, 0.1, 0.0), (1.0, 0.4, 2.0)])
@pytest.mark.parametrize("strength", [0.5, 10.0])
def test_pull_divided_by_all_holds_is_the_strength(strength, weights):
    base, _, kl = weights
    chosen = policy_weights(strength, LossWeights(*weights))
    assert float(chosen.pull / (base + kl + chosen.pull * chosen.anchor)) == pytest.approx(strength, rel=1e-5)
    assert float(chosen.strength) == strength


def test_at_the_guides_weights_the_anchor_has_three_quarters_of_the_hold():
    chosen = policy_weights(10.0, LossWeights(base=1.0, policy=0.1, kl=0.0))
    assert (float(chosen.pull), float(chosen.anchor)) == (pytest.approx(40.0), pytest.approx(0.075))


@pytest.mark.parametrize("strength", [0.5, 10.0])
def test_the_anchor_is_positive_above_the_smallest_policy_loss_weight(strength):
    def anchor(weight):
        return float(policy_weights(strength, LossWeights(base=1.0, policy=weight, kl=0.0)).anchor)

    assert anchor(LEAST_POLICY_WEIGHT) == pytest.approx(0.0, abs=1e-7)
    assert anchor(1.01 * LEAST_POLICY_WEIGHT) > 0 > anchor(0.99 * LEAST_POLICY_WEIGHT)


def compare_all(scores):
    """The deviations of all results from their mean."""
    return ScoreDeviations(np.arange(len(scores)), scores - scores.mean(0))


def draw_table(rng, *, weights=GUIDE, spread=0.1, sample_weights=None):
    """Scores of 2,000 results that vary by `spread`, and advantages that grow with the first two of three scores."""
    scores = 0.5 + spread * rng.uniform(-1, 1, size=(2000, 3))
    advantages = (scores - 0.5) @ [2.0, 1.0, -1.0] + 0.05 * rng.normal(size=2000)
    ones = np.ones(2000) if sample_weights is None else sample_weights(scores)
    return (
        strength_table(("a", "b", "c"), scores.mean(0), compare_all(scores), advantages, ones, weights),
        scores,
        advantages,
    )


def test_predicted_movement_is_the_mean_score_under_the_minimum_of_the_losses():
    """Scores that are linear in the image move like the velocity: to the weighted mean that minimizes all losses."""
    table, scores, advantages = draw_table(
        np.random.default_rng(0), sample_weights=lambda scores: 2 * scores[:, 0] / (2 * scores[:, 0]).mean()
    )
    weights = 2 * scores[:, 0] / (2 * scores[:, 0]).mean()
    chosen = policy_weights(3.0, GUIDE)
    pull, anchor = float(chosen.pull), float(chosen.anchor)
    centered = scores - scores.mean(0)
    # minimum over d of  mean[ w·(d − x)² ] + κ·( −2·mean[A·d·x] + b·d² )  for every score's deviation x
    expected = (weights @ centered + pull * advantages @ centered) / len(scores) / (1.0 + pull * anchor)
    np.testing.assert_allclose(table.movements(3.0), expected, rtol=1e-5)


def test_the_chosen_strength_gains_what_there_is_to_gain_in_the_scores_that_are_taught():
    table, _, _ = draw_table(np.random.default_rng(1), spread=0.45)
    reward_weights = np.asarray([0.4, 0.3, 0.3])
    strength = choose_strength(table, reward_weights)
    assert strength < table.max_strength
    taught = table.movements(strength)[:2]
    assert reward_weights[:2] @ taught == pytest.approx(reward_weights[:2] @ (1 - table.means[:2]), rel=1e-6)
    assert "not taught" in table.lines(strength)[3] and "not taught" not in "".join(table.lines(strength)[:3])


def test_the_chosen_strength_is_limited_by_the_spread_of_the_results():
    table, _, advantages = draw_table(np.random.default_rng(2), spread=0.01)
    assert choose_strength(table, np.ones(3)) == pytest.approx(MAX_SHIFT / advantages.std())


def test_a_base_loss_that_brings_the_gain_by_itself_leaves_a_tenth_to_the_policy():
    table, _, _ = draw_table(
        np.random.default_rng(3),
        spread=0.45,
        weights=LossWeights(base=1.0, policy=0.03, kl=0.0),
        sample_weights=lambda scores: (scores[:, 0] > 0.9) / (scores[:, 0] > 0.9).mean(),
    )
    only_first = np.asarray([1.0, 0.0, 0.0])
    room = 1 - table.means[0]
    left = max(room - table.base_share * table.weight_covariances[0], 0.1 * room)
    assert choose_strength(table, only_first) == pytest.approx(left / table.advantage_covariances[0])


def test_scores_that_never_vary_leave_nothing_to_learn():
    table = strength_table(("a",), np.full(1, 0.5), compare_all(np.zeros((8, 1))), np.zeros(8), np.ones(8), GUIDE)
    with pytest.raises(ValueError, match="no score is higher in the better results"):
        choose_strength(table, np.ones(1))


def test_the_limit_counts_the_advantages_of_all_results():
    """Ten results in scenes of two, whose scores hardly differ, among 1,000 single ones: the policy loss sees all."""
    rng = np.random.default_rng(5)
    advantages = np.concatenate([np.tile([0.1, -0.1], 5), rng.normal(size=1000)])
    compared = ScoreDeviations(np.arange(10), 0.001 * advantages[:10, None])
    table = strength_table(("a",), np.full(1, 0.5), compared, advantages, np.ones(1010), GUIDE)
    strength = choose_strength(table, np.ones(1))
    assert strength == pytest.approx(MAX_SHIFT / advantages.std()) and strength < 6.0


@pytest.mark.parametrize("mean", [1.5, -0.2, np.nan])
def test_scores_outside_0_and_1_are_refused(mean):
    advantages = np.asarray([1.0, -1.0])
    compared = ScoreDeviations(np.arange(2), advantages[:, None])
    table = strength_table(("mine",), np.asarray([mean]), compared, advantages, np.ones(2), GUIDE)
    with pytest.raises(ValueError, match=f"the mean of mine is {mean:g}: expected scores between 0 and 1"):
        choose_strength(table, np.ones(1))
    both = strength_table(
        ("mine", "a"),
        np.asarray([mean, 0.5]),
        replace(compared, deviations=np.ones((2, 2)) * advantages[:, None]),
        advantages,
        np.ones(2),
        GUIDE,
    )
    assert choose_strength(both, np.asarray([0.0, 1.0])) == pytest.approx(0.5)  # a score without a weight is only shown


def test_scores_that_are_all_1_leave_nothing_to_learn():
    """A score of mean 1 has no gap; another one that is taught sets the strength alone."""
    advantages = np.asarray([1.0, -1.0])
    compared = ScoreDeviations(np.arange(2), np.asarray([[0.1, 0.1], [-0.1, -0.1]]))
    table = strength_table(("a", "b"), np.asarray([1.0, 0.8]), compared, advantages, np.ones(2), GUIDE)
    assert choose_strength(table, np.ones(2)) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="nothing to learn"):
        choose_strength(table, np.asarray([1.0, 0.0]))


def test_a_movement_beyond_the_best_score_is_remarked():
    table, _, _ = draw_table(np.random.default_rng(4), spread=0.45)
    assert "more than there is to gain" in table.lines(100.0)[1]


def test_share_of_results_that_matching_pushes_away():
    """Two results at two times: c = w_base·w·p_base + w_policy·A·p_policy, by hand."""
    share = share_pushed_away(
        np.asarray([1.0, -1.0]),
        np.asarray([1.5, 0.5]),
        np.asarray([2.0, 0.1]),
        np.asarray([1.0, 1.0]),
        base_weight=1.0,
        policy_weight=0.8,
    )
    # c of the worse result: 0.5·2 − 0.8 = 0.2 and 0.5·0.1 − 0.8 < 0; of the better one both are positive.
    assert share == 0.25


def test_only_differences_within_a_scene_count():
    scores = np.asarray([[0.1], [0.3], [0.9], [0.5], [0.7]])
    found = within_scenes(scores, np.asarray([0, 0, 1, 2, 2]))  # scene 1 has a single result
    assert found.rows.tolist() == [0, 1, 3, 4]
    np.testing.assert_allclose(found.deviations[:, 0], [-0.1, 0.1, -0.1, 0.1])
    single = within_scenes(scores, np.arange(5))
    np.testing.assert_allclose(single.deviations[:, 0], scores[:, 0] - 0.5)
