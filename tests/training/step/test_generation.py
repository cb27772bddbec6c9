"""Tests the generation of samples for automatic rewards: rollouts, their noise, sampled experts, and scores."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.data.batch import Batch
from ra_jax.data.diptych import right_panel
from ra_jax.inference.sampling import initial_noise, make_remover
from ra_jax.rewards.registry import REWARDS, RewardInputs
from ra_jax.rl.rollouts import Sample
from ra_jax.training.setup import Setup, set_up
from ra_jax.training.step.encode import EncodedBatch, LossContext, encode
from ra_jax.training.step.generation import decode_panels, generate_samples, sample_experts

GENERATIONS, CONDITIONS = 3, 2


@dataclass(frozen=True)
class Rollout:
    """A batch, and the samples [G, B, ...] and scores [G, B, S] that the first step generates for it."""

    setup: Setup
    batch: Batch
    encoded: EncodedBatch
    samples: Sample
    scores: jax.Array


@pytest.fixture(scope="module")
def rollout(make_automatic_config):
    """Return a batch and its samples, generated with random experts."""
    setup = set_up(make_automatic_config())
    rng = np.random.default_rng(0)
    random_experts = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), setup.state.trainable)
    setup = replace(setup, state=replace(setup.state, trainable=random_experts))
    batch = jax.tree.map(lambda x: x[0], next(setup.batches()))
    return generate(setup, batch)


def generate(setup, batch, **changes):
    """Generate samples for a batch, with `changes` of the rollout settings."""
    settings = replace(setup.step_settings.rollouts, **changes)

    @jax.jit
    def run(state, frozen, batch):
        encoded = encode(setup.loaded.model, frozen, batch, "balanced")
        context = LossContext(frozen, batch, encoded, state.seed, state.temperature, state.strength)
        return encoded, *generate_samples(setup.objective, settings, state, context)

    return Rollout(setup, batch, *run(setup.state, setup.frozen, batch))


def test_rollouts_equal_the_images_of_inference_for_the_same_noise(rollout, monkeypatch):
    """Compares with the images of `make_remover` and with their scores."""
    setup, batch = rollout.setup, rollout.batch

    def fixed_noise(group_keys, sample_keys, grid, features):
        keys = jax.vmap(jax.random.key)(jnp.arange(CONDITIONS))
        return initial_noise(setup.loaded.model, keys, 32, 32)

    monkeypatch.setattr("ra_jax.training.step.generation.diptych_noise", fixed_noise)
    generated = generate(setup, batch)
    encoded, samples, scores = generated.encoded, generated.samples, generated.scores
    keys = jax.vmap(jax.random.key)(jnp.arange(CONDITIONS))
    remove = make_remover(setup.loaded.model, setup.objective.schedule, num_inference_steps=6, guidance_scale=30.0)
    images, _ = remove(setup.state.trainable, setup.frozen, batch, initial_noise(setup.loaded.model, keys, 32, 32))
    for sample in range(GENERATIONS):
        panels = decode_panels(
            setup.objective,
            setup.step_settings.rollouts,
            setup.frozen,
            samples.clean[sample],
            encoded.condition.grid,
        )
        np.testing.assert_allclose(panels, images, atol=1e-4)
    truth = batch["result"] / np.float32(255)
    decoded = jnp.clip(
        right_panel(setup.loaded.model.decode(setup.frozen, encoded.clean, encoded.condition.grid)), 0, 1
    )
    assert (batch["mask"] >= batch["file_mask"]).all() and (batch["mask"] > batch["file_mask"]).any()  # it is augmented
    inputs = RewardInputs(
        images, batch["source"] / np.float32(255), batch["file_mask"].astype(np.float32), truth, decoded
    )
    for i, name in enumerate(("removal", "background", "smoothness")):
        np.testing.assert_allclose(scores[0, :, i], REWARDS[name].function(inputs), atol=1e-3)


def test_rollouts_share_the_left_panels_noise_and_differ_on_the_right(rollout, monkeypatch):
    """The test replaces `roll_out` by a function that returns the initial noise."""
    setup, batch = rollout.setup, rollout.batch
    monkeypatch.setattr(
        "ra_jax.training.step.generation.roll_out", lambda velocity, noise, times, noisy: Sample(noise(jnp.asarray(0)))
    )
    rows, columns = rollout.encoded.condition.grid
    noise = np.asarray(generate(setup, batch).samples.clean).reshape(GENERATIONS, CONDITIONS, rows, columns, -1)
    left, right = noise[:, :, :, : columns // 2], noise[:, :, :, columns // 2 :]
    np.testing.assert_array_equal(left[0], left[1])
    assert not np.any(left[0, 0] == left[0, 1])  # different conditions
    flat = right.reshape(GENERATIONS * CONDITIONS, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.3
    assert abs(noise.std() - 1) < 0.05


def test_decoding_in_microbatches_gives_the_same_scores(rollout):
    one_at_a_time = generate(rollout.setup, rollout.batch, decode_batch_size=1)
    np.testing.assert_allclose(one_at_a_time.scores, rollout.scores, atol=1e-5)


def test_rollouts_depend_on_the_step_and_not_on_the_order_of_the_batch(rollout):
    """A batch with its conditions in reverse order gives the same rollouts. The next step gives other rollouts."""
    setup, batch, samples = rollout.setup, rollout.batch, rollout.samples
    reversed_batch = {name: values[::-1] for name, values in batch.items()}
    np.testing.assert_allclose(generate(setup, reversed_batch).samples.clean[:, ::-1], samples.clean, atol=1e-4)
    next_step = replace(setup, state=replace(setup.state, step=jnp.asarray(1)))
    assert np.abs(generate(next_step, batch).samples.clean - samples.clean).max() > 0.1


def test_experts_are_sampled_with_the_gates_as_probabilities(rollout):
    settings = replace(rollout.setup.step_settings.rollouts, sample_experts=True)
    gates = jnp.tile(jnp.asarray([[0.6, 0.3, 0.1]]), (4000, 1))
    weights, experts = sample_experts(settings, gates, jax.vmap(jax.random.key)(jnp.arange(4000)))
    np.testing.assert_allclose(weights.mean(0), gates[0], atol=0.03)
    np.testing.assert_array_equal(weights.argmax(1), experts)
