"""Steps without rewards are counted and logged, and too many of them in a row stop the run."""

import logging

import numpy as np
import pytest

from ra_jax.training.fallbacks import FALLBACK, RewardFallbacks

FINITE = {"reward_fallbacks": np.float32(0), "mean_reward": np.float32(0.1), "removal_score": np.float32(0.5)}
NOT_FINITE = {
    "reward_fallbacks": np.float32(1),
    "mean_reward": np.float32(np.nan),
    "removal_score": np.float32(0.5),
    "my_score": np.float32(np.inf),
}


def test_counts_and_names_what_is_broken(caplog):
    fallbacks = RewardFallbacks(3.0)
    with caplog.at_level(logging.WARNING):
        assert fallbacks.count([FINITE, NOT_FINITE, {"base_loss": np.float32(1)}, NOT_FINITE], steps_done=20) == 5.0
    assert [record.message.split(": ")[0] for record in caplog.records] == [
        f"{FALLBACK} at step 18",
        f"{FALLBACK} at step 20",
    ]
    assert "my_score is inf" in caplog.text and "removal_score" not in caplog.text


def test_ten_in_a_row_over_rows_and_steps_without_rewards():
    fallbacks = RewardFallbacks()
    fallbacks.count([NOT_FINITE] * 9 + [FINITE], steps_done=10)
    fallbacks.count([NOT_FINITE, {}] * 9, steps_done=28)
    with pytest.raises(FloatingPointError, match=r"at step 29 for the 10th time in a row; my_score is inf"):
        fallbacks.count([NOT_FINITE], steps_done=29)


def test_the_cause_of_a_series_that_ends_in_a_step_that_did_not_fit():
    fallbacks = RewardFallbacks()
    fallbacks.count([NOT_FINITE] * 9, steps_done=9)
    with pytest.raises(FloatingPointError, match=r"10th time in a row; a step with rewards does not fit the device"):
        fallbacks.count([{"reward_fallbacks": np.float32(1)}], steps_done=10)


def test_a_step_that_did_not_fit_is_counted_but_not_logged_again(caplog):
    with caplog.at_level(logging.WARNING):
        assert RewardFallbacks().count([{"reward_fallbacks": np.float32(1)}], steps_done=1) == 1.0
    assert not caplog.records
