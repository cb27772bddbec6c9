"""Compares the clipped policy loss with PPO's formula in torch; tests the flow-matching error and the temperature."""

from dataclasses import dataclass
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.rl.losses import clipped_policy_loss, flow_matching_error, next_temperature

if find_spec("torch"):
    import torch

EPSILON = 0.2
# Log-ratios inside, above and below the clip range, above 3 and below −3, each with both signs of the advantage.
LOG_RATIOS = np.tile([0.0, 0.1, -0.15, 0.5, -0.6, 3.5, -4.0], 2).astype(np.float32)
ADVANTAGES = np.repeat([1.3, -0.7], 7).astype(np.float32)
OLD = np.linspace(-2, 1, 14, dtype=np.float32)


def ppo(log_prob: "torch.Tensor") -> "torch.Tensor":
    """Compute −mean min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A), the negated objective of 1707.06347."""
    ratio = torch.exp(torch.clamp(log_prob - torch.from_numpy(OLD), max=3))
    advantages = torch.from_numpy(ADVANTAGES)
    return -torch.minimum(ratio * advantages, torch.clamp(ratio, 1 - EPSILON, 1 + EPSILON) * advantages).mean()


@dataclass(frozen=True)
class ClippedLoss:
    """Value and metrics of the clipped loss, and its gradients for each of its inputs."""

    value: jax.Array
    metrics: dict[str, jax.Array]
    log_prob_gradient: jax.Array
    old_gradient: jax.Array
    advantages_gradient: jax.Array


@pytest.fixture
def clipped_loss():
    def loss(log_prob, old, advantages):
        return clipped_policy_loss(log_prob - jax.lax.stop_gradient(old), advantages, clip_range=EPSILON)

    (value, metrics), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(OLD + LOG_RATIOS, OLD, ADVANTAGES)
    return ClippedLoss(value, metrics, *gradients)


@pytest.mark.torch
def test_loss_and_gradient_match_ppo(clipped_loss):
    log_prob = torch.from_numpy(OLD + LOG_RATIOS).requires_grad_()
    theirs = ppo(log_prob)
    theirs.backward()
    np.testing.assert_allclose(clipped_loss.value, theirs.detach(), rtol=1e-5)
    np.testing.assert_allclose(clipped_loss.log_prob_gradient, log_prob.grad, rtol=1e-4, atol=1e-7)


def test_clipped_samples_old_policy_and_advantages_get_no_gradient(clipped_loss):
    gradient = clipped_loss.log_prob_gradient
    ratio = np.exp(LOG_RATIOS)
    beyond_range = ((ADVANTAGES > 0) & (ratio > 1 + EPSILON)) | ((ADVANTAGES < 0) & (ratio < 1 - EPSILON))
    clipped = beyond_range | (LOG_RATIOS > 3)
    assert 0 < clipped.sum() < clipped.size
    np.testing.assert_array_equal(np.asarray(gradient) == 0, clipped)
    np.testing.assert_allclose(gradient[~clipped], (-ADVANTAGES * ratio / ratio.size)[~clipped], rtol=1e-5)
    assert not np.any(clipped_loss.old_gradient) and not np.any(clipped_loss.advantages_gradient)


def test_metrics_are_the_mean_ratio_the_clip_fraction_and_the_approximate_kl(clipped_loss):
    metrics = clipped_loss.metrics
    log_ratio = np.minimum(LOG_RATIOS, 3)
    ratio = np.exp(log_ratio)
    assert float(metrics["mean_ratio"]) == pytest.approx(ratio.mean(), rel=1e-5)
    assert float(metrics["clip_fraction"]) == pytest.approx(4 / 7)
    assert float(metrics["approx_kl"]) == pytest.approx((ratio - 1 - log_ratio).mean(), rel=1e-4)
    assert metrics["approx_kl"] >= 0


def test_equal_policies_give_the_plain_policy_gradient():
    def loss(log_prob):
        return clipped_policy_loss(log_prob - jax.lax.stop_gradient(log_prob), ADVANTAGES, clip_range=EPSILON)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(OLD))
    assert float(value) == pytest.approx(-ADVANTAGES.mean(), rel=1e-6)
    assert metrics == {"mean_ratio": 1.0, "clip_fraction": 0.0, "approx_kl": 0.0}
    np.testing.assert_allclose(gradient, -ADVANTAGES / ADVANTAGES.size, rtol=1e-6)


def test_a_weighted_mean_applies_to_the_loss_and_all_metrics():
    weights = np.linspace(0, 1, 14)
    weights /= weights.sum()
    value, metrics = clipped_policy_loss(
        LOG_RATIOS, ADVANTAGES, clip_range=EPSILON, mean=lambda x: jnp.sum(weights * x)
    )
    each = [clipped_policy_loss(LOG_RATIOS[i : i + 1], ADVANTAGES[i : i + 1], clip_range=EPSILON) for i in range(14)]
    assert float(value) == pytest.approx(sum(w * float(loss) for w, (loss, _) in zip(weights, each, strict=True)))
    for name, got in metrics.items():
        assert float(got) == pytest.approx(sum(w * float(m[name]) for w, (_, m) in zip(weights, each, strict=True)))


def test_flow_matching_error_is_the_squared_error_of_the_velocity_over_the_region():
    rng = np.random.default_rng(0)
    clean, noise, predicted = rng.normal(size=(3, 2, 8, 12)).astype(np.float32)
    region = rng.uniform(size=(2, 8, 4)).astype(np.float32)
    expected = np.zeros(2)
    for record, token, channel, cell in np.ndindex(2, 8, 3, 4):
        i = record, token, 4 * channel + cell
        expected[record] += region[record, token, cell] * (predicted[i] - (noise[i] - clean[i])) ** 2 / 3
    np.testing.assert_allclose(flow_matching_error(predicted, clean, noise, region), expected, rtol=1e-5)


def test_temperature_rises_with_the_clip_fraction():
    temperature = jnp.float32(0.1)
    assert float(next_temperature(temperature, 0.15)) == pytest.approx(0.1)
    assert float(next_temperature(temperature, 0.65)) == pytest.approx(0.1 * np.exp(0.25))
    assert float(next_temperature(temperature, 0.0)) == pytest.approx(0.1 * np.exp(-0.075))
