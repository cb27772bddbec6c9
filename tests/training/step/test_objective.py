"""Tests parts of the loss without a train step."""

from dataclasses import replace
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.parallel.partitioning import named_leaves
from ra_jax.rl.rollouts import Sample
from ra_jax.training.setup import set_up
from ra_jax.training.step.encode import LossContext, encode


def test_sequential_time_steps_give_the_same_loss_and_gradient(make_config):
    setup = set_up(make_config(gradient_checkpointing="points", num_policy_timesteps=3, kl_weight=0.1))
    state, batch = setup.state, jax.tree.map(lambda x: x[0], next(islice(setup.batches(), 1)))
    encoded = jax.jit(lambda frozen: encode(setup.objective.model, frozen, batch, "balanced"))(setup.frozen)
    sample = Sample(encoded.clean)
    context = LossContext(setup.frozen, batch, encoded, state.seed, state.temperature, state.strength)

    def loss_and_gradient(objective):
        def loss(trainable):
            reference = objective.reference_velocity(state.trainable, context, sample)
            old = objective.evaluate_policy(state.trainable, context, sample, reference).terms
            arguments = (context, sample, jnp.ones(len(batch["mask"])), old, reference)
            return objective.policy_loss(trainable, *arguments, on_policy=jnp.asarray(False))

        (value, (_, old_terms)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            jax.tree.map(lambda x: x + 0.01, state.trainable)
        )
        return {"loss": value, **old_terms, **named_leaves(gradient)}

    one_by_one, together = (
        loss_and_gradient(
            replace(setup.objective, settings=replace(setup.objective.settings, sequential_timesteps=sequential))
        )
        for sequential in (setup.objective.settings.sequential_timesteps, False)
    )
    assert setup.objective.settings.sequential_timesteps
    largest = max(float(jnp.abs(value).max()) for name, value in together.items() if "lora" in name)
    assert largest > 1e-4
    for name, value in together.items():
        np.testing.assert_allclose(one_by_one[name], value, rtol=1e-4, atol=1e-5 * largest, err_msg=name)


@pytest.fixture(scope="module")
def moved(make_config_in, tmp_path_factory):
    """A set-up whose experts are not the base's any more, with a microbatch, its context and its sample."""
    setup = set_up(make_config_in(tmp_path_factory.mktemp("moved")))
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), setup.state.trainable)
    batch = jax.tree.map(lambda x: x[0], next(islice(setup.batches(), 1)))
    encoded = encode(setup.objective.model, setup.frozen, batch, "balanced")
    state = setup.state
    context = LossContext(setup.frozen, batch, encoded, state.seed, state.temperature, state.strength)
    return setup, trainable, context, Sample(encoded.clean)


def with_reference(context, reference):
    return replace(context, frozen=context.frozen | {"reference": reference})


def test_the_reference_of_new_experts_is_the_velocity_with_the_experts_off(moved):
    setup, trainable, context, sample = moved
    objective = setup.objective
    x, t = objective.policy_cache(context, sample).points()
    off = objective.velocity_at_points(trainable, context, x, t, None)
    np.testing.assert_allclose(objective.reference_velocity(trainable, context, sample), off, atol=1e-5)
    on = objective.evaluate_policy(trainable, context, sample, off).velocity
    assert float(jnp.abs(on - off).max()) > 1e-2


def test_other_experts_as_reference_are_run_with_their_own_gates(moved):
    """The policy with the reference's weights is the reference: ℓ and the anchor are exactly 0."""
    setup, trainable, context, sample = moved
    objective, context = setup.objective, with_reference(context, trainable)
    reference = objective.reference_velocity(setup.state.trainable, context, sample)
    output = objective.evaluate_policy(trainable, context, sample, reference)
    np.testing.assert_array_equal(output.terms["log_prob"], 0.0)
    np.testing.assert_array_equal(output.anchor, 0.0)


def test_sampled_experts_anchor_the_gates_at_the_initial_ones(moved):
    """KL(w ‖ w_initial) joins the anchor. It is 0 for the initial gates."""
    setup, trainable, context, sample = moved
    objective = setup.objective
    drawn = replace(sample, experts=jnp.zeros(len(sample.clean), jnp.int32))
    gates, _ = objective.model.gates(trainable, context.encoded.condition)
    for reference, initial in (
        (None, jnp.asarray([0.4, 0.3, 0.3])),
        (trainable, gates),
    ):
        current = context if reference is None else with_reference(context, reference)
        velocity = objective.reference_velocity(trainable, current, drawn)
        output = objective.evaluate_policy(trainable, current, drawn, velocity)
        distance = objective.policy_cache(current, drawn).mean((output.velocity - velocity) ** 2).mean(1)
        kl = (gates * jnp.log(gates / initial)).sum(-1)
        np.testing.assert_allclose(output.anchor, distance + kl, rtol=1e-4, atol=1e-6)
    assert float(kl.max()) == 0.0


def test_the_base_loss_has_its_own_guidance(moved):
    setup, trainable, context, _ = moved

    def base_loss(**changes):
        objective = replace(setup.objective, settings=replace(setup.objective.settings, **changes))
        return float(objective.base_loss(trainable, context, setup.state.step)[0])

    usual = base_loss()
    assert base_loss(guidance_scale=1.0) == usual != base_loss(base_guidance_scale=1.0)
    assert base_loss(guidance_scale=1.0, base_guidance_scale=1.0) == base_loss(base_guidance_scale=1.0)


def test_the_logged_policy_loss_times_its_weight_is_what_the_total_takes(moved):
    setup, trainable, context, sample = moved
    objective = setup.objective
    reference = objective.reference_velocity(trainable, context, sample)
    old = objective.evaluate_policy(trainable, context, sample, reference).terms
    total, (metrics, _) = objective.policy_loss(
        trainable, context, sample, context.batch["advantage"], old, reference, on_policy=jnp.asarray(True)
    )
    assert float(total) == pytest.approx(objective.settings.policy_loss_weight * float(metrics["policy_loss"]))
    strength = context.strength
    expected = strength.pull * strength.anchor * metrics["reference_distance"]  # at ρ = 1 only the anchor is left
    assert float(total) == pytest.approx(float(expected), rel=1e-4)
