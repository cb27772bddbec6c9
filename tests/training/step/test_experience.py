"""Tests the advantages of a step: equal rewards, rewards that are not finite, and negative advantages."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.parallel.partitioning import named_leaves
from ra_jax.rewards.custom import Reward
from ra_jax.rl.rollouts import Sample
from ra_jax.training.build import step_settings
from ra_jax.training.setup import set_up
from ra_jax.training.step import experience
from ra_jax.training.step.objective import Objective


def replace_rewards(setup, rewards):
    rollouts = replace(setup.step_settings.rollouts, rewards=rewards)
    return replace(setup, step_settings=replace(setup.step_settings, rollouts=rollouts))


def nan_reward(inputs):
    return jnp.where(inputs.image.mean((1, 2, 3)) > -1.0, jnp.nan, 0.0)


def test_rollouts_with_equal_rewards_give_a_gradient_of_zero(make_automatic_config, photo_flags, run_steps):
    """With a constant reward all advantages are 0. The other losses are off, so the gradient is 0."""
    setup = set_up(make_automatic_config(diversity_loss_weight=0.0, adam_weight_decay=0.0, **photo_flags))
    constant = (Reward("constant", lambda inputs: jnp.full(inputs.image.shape[:1], 0.7), 1.0),)
    _, rows = run_steps(replace_rewards(setup, constant), 1)
    assert rows[0]["grad_norm"] == 0.0
    assert rows[0]["frac_reward_zero_std"] == 1.0
    assert rows[0]["mean_reward"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("flags", "dropped"),
    [
        ({}, False),
        ({"policy_estimator": "matching"}, True),
        ({"policy_estimator": "sde"}, False),
        ({"policy_estimator": "nft", "kl_weight": 0.1}, False),
        ({"policy_estimator": "matching", "negative_advantages": "keep"}, False),
        ({"policy_estimator": "sde", "negative_advantages": "drop"}, True),
    ],
)
def test_the_settings_drop_or_keep_negative_advantages(make_automatic_config, flags, dropped):
    settings = step_settings(make_automatic_config(**flags), (Reward("mine", nan_reward, 1.0),)).rollouts
    samples = Sample(jnp.zeros((1, 4, 1, 2, 4)))  # a microbatch of four rollouts of one condition
    scores = jnp.asarray([0.1, 0.4, 0.6, 0.9]).reshape(1, 4, 1, 1)
    objective = Objective(None, None, None)  # `add_rewards` calls only its means and sums
    experience_with_rewards, _ = experience.add_rewards(
        objective, experience.Experience(None, None, samples=samples), scores, settings
    )
    signs = np.sign(np.asarray(experience_with_rewards.advantages).ravel())
    assert list(signs) == ([0, 0, 1, 1] if dropped else [-1, -1, 1, 1])


def test_without_the_grpo_loss_rewards_are_metrics_only(make_automatic_config, run_steps):
    _, rows = run_steps(set_up(make_automatic_config(enable_grpo_loss=False)), 1)
    assert "mean_reward" in rows[0] and "policy_loss" not in rows[0]


@pytest.mark.parametrize("estimator", ["contrast", "matching", "sde"])
def test_rewards_that_are_not_finite_remove_the_policy_loss_of_the_step(make_automatic_config, run_steps, estimator):
    """The updated weights equal those of a step without rewards. The metrics of rewards and policy are NaN."""
    flags = {"policy_estimator": estimator, "log_freq": 100, "adam_weight_decay": 0.0}
    setups = [set_up(make_automatic_config(**flags)) for _ in range(2)]
    state, rows = run_steps(replace_rewards(setups[0], (Reward("broken", nan_reward, 1.0),)), 1)
    assert rows[0]["reward_fallbacks"] == 1.0
    assert np.isfinite(rows[0]["train_loss"])
    assert all(np.isnan(rows[0][name]) for name in ("mean_reward", "policy_loss", "mean_ratio"))
    assert np.isnan(state.clip_at_sync) and state.temperature == setups[1].state.temperature
    without = replace(setups[1], computes_rewards=lambda step: False).compiled_steps()
    reference, row = without(setups[1].state, setups[1].frozen, next(setups[1].batches()))
    assert "mean_reward" not in row
    ours, theirs = named_leaves(state.trainable), named_leaves(reference.trainable)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)
