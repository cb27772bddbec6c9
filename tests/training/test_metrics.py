"""Rows of metrics."""

import numpy as np

from ra_jax.training.metrics import summarise


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
