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
    count = {"records": 3, "sync_steps": 8}
    assert step_flops(10.0, policy_pairs=4, kl=True, full_fine_tuning=False, **count) == 30 * (5 * 2 + 3.5 + 4)
    assert step_flops(10.0, policy_pairs=0, kl=False, full_fine_tuning=True, **count) == 30 * 3
