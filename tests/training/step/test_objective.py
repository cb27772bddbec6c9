"""Tests parts of the loss without a train step."""

from dataclasses import replace
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.parallel.partitioning import named_leaves
from ra_jax.rl.rollouts import Sample
from ra_jax.training.setup import set_up
from ra_jax.training.step.encode import LossContext, encode
from ra_jax.training.step.objective import map_timesteps


def test_mapping_time_steps_one_by_one_gives_the_same_rows():
    x, t = jnp.arange(24.0).reshape(6, 4, 1), jnp.arange(6.0)
    shapes = []

    def velocity(x, t):
        shapes.append(x.shape)
        return x * t[:, None, None]

    np.testing.assert_array_equal(map_timesteps(velocity, x, t, num_points=3), velocity(x, t))
    assert shapes == [(2, 4, 1), (6, 4, 1)]


def test_sequential_time_steps_give_the_same_loss_and_gradient(make_config):
    setup = set_up(make_config(gradient_checkpointing="points", num_policy_timesteps=3, kl_weight=0.1))
    state, batch = setup.state, jax.tree.map(lambda x: x[0], next(islice(setup.batches(), 1)))
    encoded = jax.jit(lambda frozen: encode(setup.objective.model, frozen, batch, "balanced"))(setup.frozen)
    sample = Sample(encoded.clean)
    context = LossContext(setup.frozen, batch, encoded, state.seed, state.temperature)

    def loss_and_gradient(objective):
        def loss(trainable):
            old = objective.evaluate_policy(state.trainable, context, sample).terms
            advantages = jnp.ones(len(batch["mask"]))
            return objective.policy_loss(trainable, context, sample, advantages, old, on_policy=jnp.asarray(False))

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
