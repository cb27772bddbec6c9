"""Rows of metrics, and the count of arithmetic."""

import numpy as np

from ra_jax.models.flux import FluxConfig
from ra_jax.reporting.trackers import summarise
from ra_jax.training.flops import attention_flops, expert_flops, step_flops


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
    human = {"records": 3, "attention": 0.0, "old_policy_share": 7 / 8}
    assert step_flops(10.0, policy_points=4, kl=True, full_fine_tuning=False, **human) == 30 * (5 * 2 + 3.5 + 4)
    assert step_flops(10.0, policy_points=0, kl=False, full_fine_tuning=True, attention=0.0, records=3) == 30 * 3


def test_arithmetic_of_an_automatic_step():
    """By hand: 3 conditions of 8 rollouts of 6 forward passes; 2 updates of a base pass and 4 passes a rollout."""
    count = {"records": 3, "attention": 0.0, "members": 8, "rollout_steps": 6, "updates": 2, "policy_points": 4}
    assert step_flops(10.0, kl=False, full_fine_tuning=False, **count) == 30 * (8 * 6 + 2 * (2 + 8 * 4 * 2))
    without_base = step_flops(10.0, kl=True, full_fine_tuning=False, base_loss=False, **count)
    assert without_base == 30 * (8 * 6 + 2 * 8 * 4 * 3)


def test_arithmetic_of_attention():
    """By hand: q kᵀ of S² scores of D products a head and block, weights by v as many; both have two gradients."""
    config = FluxConfig(
        num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=4, axes_dims_rope=(4, 6, 6)
    )
    attention = attention_flops(config, image_tokens=10, context_tokens=7)
    assert attention == 5 * 4 * (2 * 17 * 17 * 16 + 2 * 17 * 17 * 16)
    human = {"records": 3, "policy_points": 4, "kl": False, "attention": 4.0}
    assert step_flops(10.0, full_fine_tuning=False, **human) == 3 * 5 * (10 + 10 + 4)
    assert step_flops(10.0, full_fine_tuning=True, **human) == 3 * 5 * (10 + 10 + 4 + 6)


def test_arithmetic_of_experts():
    """By hand: their products in every forward pass, twice more in a trained one; none in the base's passes for KL."""
    human = {"records": 3, "attention": 0.0, "old_policy_share": 7 / 8, "experts": 1.0}
    found = step_flops(10.0, policy_points=4, kl=True, full_fine_tuning=False, **human)
    assert found == 3 * (5 * (2 * 11 + 1) + 3.5 * 11 + 4 * 10)
    shapes = {
        "transformer_blocks/attn/to_q/lora_a": (2, 4, 3),
        "transformer_blocks/attn/add_q_proj/lora_b": (2, 3, 4),
        "transformer_blocks/ff_context/net/2/lora_a": (2, 16, 3),
        "transformer_blocks/norm1_context/linear/lora_a": (2, 4, 3),
        "single_transformer_blocks/proj_out/lora_a": (5, 20, 3),
    }
    by_hand = 2 * (10 * 24 + 7 * 24 + 7 * 96 + 1 * 24 + 17 * 300)
    assert expert_flops(shapes, image_tokens=10, context_tokens=7) == by_hand


def test_what_some_steps_measured_is_their_mean():
    """Steps without rewards have no such metrics, steps whose rewards failed have NaN or worse."""
    steps = [{"mean_reward": np.float32(value)} for value in (1.0, np.nan, 3.0)] + [{"lr": np.float32(1)}]
    steps[1]["my_score"] = np.float32(np.inf)
    assert summarise(steps) == {"mean_reward": 2.0, "lr": 1.0}
