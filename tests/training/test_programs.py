"""Compiled steps: with rewards and without, and what happens where one does not fit the device."""

import logging
import threading
from dataclasses import replace

import jax
import pytest

from ra_jax.config.settings import RolloutConfig
from ra_jax.errors import ConfigError
from ra_jax.training import programs
from ra_jax.training.setup import set_up
from ra_jax.training.step.train_step import make_train_step


class Compiled:
    """Stands for a compiled step: says which settings it was made with."""

    def __init__(self, settings):
        self.settings = settings

    def __call__(self, state, frozen, batch):
        return state, {} if self.settings.rollouts is None else {"mean_reward": 0.0}


@pytest.fixture
def compile_nothing(make_automatic_config, monkeypatch):
    """(setup, its programs, the settings they were compiled with so far), nothing really compiled."""
    setup, tried = set_up(make_automatic_config(decode_batch_size=8, train_batch_size=4)), []

    def compile_(self, settings, arguments):
        tried.append(settings)
        return Compiled(settings)

    monkeypatch.setattr(programs.CompiledSteps, "_compile", compile_)
    monkeypatch.setattr(programs, "program_memory", lambda program: 10**9 * program.settings.rollouts.decode_batch_size)

    def run(memory, steps=1, interval=1, results=True):
        monkeypatch.setattr(programs, "device_memory", lambda: memory)
        due = RolloutConfig(reward_interval=interval).due
        step, batch = replace(setup, computes_rewards=due).compiled_steps(), dict(next(setup.batches()))
        if not results:
            del batch["result"]
        rows = [step(setup.state, setup.frozen, batch, number)[1] for number in range(steps)]
        return rows, [None if settings.rollouts is None else settings.rollouts.decode_batch_size for settings in tried]

    return run


def test_rewards_every_other_step(compile_nothing):
    rows, tried = compile_nothing(10**12, steps=3, interval=2)
    assert rows == [{"mean_reward": 0.0}, {}, {"mean_reward": 0.0}]
    assert tried == [4, None]


def test_a_step_that_does_not_fit_decodes_less_at_once(compile_nothing):
    assert compile_nothing(2 * 10**9) == ([{"mean_reward": 0.0}], [4, 2])


def test_a_step_that_never_fits_goes_on_without_rewards(compile_nothing, caplog):
    with caplog.at_level(logging.WARNING):
        rows, tried = compile_nothing(10**8, steps=2)
    assert rows == [{"reward_fallbacks": 1.0}, {}]
    assert tried == [4, 2, 1, None]
    assert "Failed to compute GRPO rewards, falling back to simple loss" in caplog.text
    assert "needs 1.0 GB with one image decoded at a time, the device has 0.1 GB" in caplog.text
    assert "--gradient_checkpointing full" in caplog.text


def test_a_step_that_never_fits_has_nothing_to_go_on_with_without_results(compile_nothing):
    with pytest.raises(ConfigError, match=r"needs 1.0 GB .*no simple loss to fall back to"):
        compile_nothing(10**8, results=False)


def test_a_compiler_that_finds_no_room_counts_as_not_fitting(make_automatic_config, monkeypatch, caplog):
    setup = set_up(make_automatic_config(decode_batch_size=1))

    def compile_(self, settings, arguments):
        if settings.rollouts is not None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return Compiled(settings)

    monkeypatch.setattr(programs.CompiledSteps, "_compile", compile_)
    _, row = setup.compiled_steps()(setup.state, setup.frozen, next(setup.batches()))
    assert row == {"reward_fallbacks": 1.0} and "falling back to simple loss" in caplog.text


@pytest.mark.slow
def test_memory_grows_with_the_group_by_its_latents_alone(make_automatic_config, photo_flags):
    """Temporaries of the compiled step: from 2 to 8 rollouts a condition."""

    def temporaries(generations):
        setup = set_up(make_automatic_config(num_generations=generations, log_freq=100, **photo_flags))
        step = make_train_step(setup.objective, setup.optimizer, setup.step_settings)
        program = setup.partitioner.compile(step, setup.state, setup.frozen, next(setup.batches()))
        latents = 4 * 32 * setup.loaded.model.latent_features * 2  # bytes of one member of each condition
        return program.memory_analysis().temp_size_in_bytes, latents

    (few, latents), (many, _) = temporaries(2), temporaries(8)
    assert many - few < 6 * 4 * latents


def test_traces_are_forgotten_once_a_program_and_not_while_one_is_compiled(make_automatic_config, monkeypatch):
    setup, going_on, forgotten = set_up(make_automatic_config()), threading.Event(), []
    monkeypatch.setattr(programs, "clear_jit_caches", forgotten.append)

    def compile_(self, *_):
        return going_on.wait(60) and Compiled(setup.step_settings)

    monkeypatch.setattr(programs.CompiledSteps, "_compile_with_rewards", compile_)
    step, batch = setup.compiled_steps(), next(setup.batches())
    step.clear_jit_caches()
    step.prepare(setup.state, setup.frozen, batch)
    step.clear_jit_caches()
    assert forgotten == []
    going_on.set()
    step(setup.state, setup.frozen, batch)
    step.clear_jit_caches()
    step.clear_jit_caches()
    assert forgotten == ["cpu"]
