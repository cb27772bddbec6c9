"""Rows of metrics, and the count of arithmetic."""

import numpy as np

from ra_jax.training.metrics import step_flops, summarise


def test_a_row_holds_means_and_the_latest_measured_values():
    steps = [
        {"train_loss": np.float32(loss), "velocity_norm_ratio": np.float32(drift)}
        for loss, drift in ((1.0, 0.9), (2.0, 1.1), (6.0, np.nan))
    ]
    row = summarise(steps)
    assert row["train_loss"] == 3.0
    np.testing.assert_allclose(row["velocity_norm_ratio"], 1.1, rtol=1e-6)


def test_what_no_step_measured_is_left_out():
    step = {"train_loss": np.float32(1.0), "velocity_norm_ratio": np.float32(np.nan)}
    assert summarise([step]) == {"train_loss": 1.0}


def test_a_loss_that_is_not_finite_stays():
    assert np.isnan(summarise([{"train_loss": np.float32(np.nan)}])["train_loss"])


def test_arithmetic_of_a_step():
    """By hand: 3 records; 1 + 4 trained passes of twice a forward, 4 old passes at 7 of 8 steps, 4 of the base."""
    human = {"records": 3, "old_policy_share": 7 / 8}
    assert step_flops(10.0, policy_points=4, kl=True, full_fine_tuning=False, **human) == 30 * (5 * 2 + 3.5 + 4)
    assert step_flops(10.0, policy_points=0, kl=False, full_fine_tuning=True, records=3) == 30 * 3


def test_arithmetic_of_an_automatic_step():
    """By hand: 3 conditions of 8 rollouts of 6 forward passes; 2 updates of a base pass and 4 passes a rollout."""
    count = {"records": 3, "members": 8, "rollout_steps": 6, "updates": 2, "policy_points": 4}
    assert step_flops(10.0, kl=False, full_fine_tuning=False, **count) == 30 * (8 * 6 + 2 * (2 + 8 * 4 * 2))
    without_base = step_flops(10.0, kl=True, full_fine_tuning=False, base_loss=False, **count)
    assert without_base == 30 * (8 * 6 + 2 * 8 * 4 * 3)


def test_what_some_steps_measured_is_their_mean():
    """Steps without rewards have no such metrics, steps whose rewards failed have NaN or worse."""
    steps = [{"mean_reward": np.float32(value)} for value in (1.0, np.nan, 3.0)] + [{"lr": np.float32(1)}]
    steps[1]["my_score"] = np.float32(np.inf)
    assert summarise(steps) == {"mean_reward": 2.0, "lr": 1.0}
