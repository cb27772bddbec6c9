"""Compiled steps with and without rewards, and steps that do not fit the device."""

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
    """A stand-in for a compiled step, with the settings that it was compiled with."""

    def __init__(self, settings):
        self.settings = settings

    def __call__(self, state, frozen, batch):
        return state, {} if self.settings.rollouts is None else {"mean_reward": 0.0}


@pytest.fixture
def compile_nothing(make_automatic_config, monkeypatch):
    """A function that runs steps without compiling any.

    It returns the metrics of the steps, and the decode_batch_size of each compilation (None without rollouts).
    """
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


def test_a_step_that_does_not_fit_decodes_fewer_images_at_once(compile_nothing):
    assert compile_nothing(2 * 10**9) == ([{"mean_reward": 0.0}], [4, 2])


def test_a_step_that_never_fits_continues_without_rewards(compile_nothing, caplog):
    with caplog.at_level(logging.WARNING):
        rows, tried = compile_nothing(10**8, steps=2)
    assert rows == [{"reward_fallbacks": 1.0}, {}]
    assert tried == [4, 2, 1, None]
    assert "Failed to compute GRPO rewards, falling back to simple loss" in caplog.text
    assert "needs 1.0 GB with one image decoded at a time, but the device has 0.1 GB" in caplog.text
    assert "--gradient_checkpointing full" in caplog.text


def test_a_step_that_never_fits_is_an_error_without_results(compile_nothing):
    with pytest.raises(ConfigError, match=r"needs 1.0 GB .*no simple loss to fall back to"):
        compile_nothing(10**8, results=False)


def test_a_compiler_that_runs_out_of_memory_counts_as_not_fitting(make_automatic_config, monkeypatch, caplog):
    setup = set_up(make_automatic_config(decode_batch_size=1))

    def compile_(self, settings, arguments):
        if settings.rollouts is not None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return Compiled(settings)

    monkeypatch.setattr(programs.CompiledSteps, "_compile", compile_)
    _, row = setup.compiled_steps()(setup.state, setup.frozen, next(setup.batches()))
    assert row == {"reward_fallbacks": 1.0} and "falling back to simple loss" in caplog.text
    assert row == {"reward_fallbacks": 1.0} and "falling back to simple loss" in caplog.text
    assert "needs more memory than the compiler could find with one image decoded at a time" in caplog.text


@pytest.mark.slow
def test_memory_grows_only_by_the_latents_of_more_samples(make_automatic_config, photo_flags):
    """Temporary memory of the compiled step with 2 and with 8 rollouts per condition.

    A rollout keeps its latents, and the velocity of the reference at two points, each as large as the latents.
    """

    def temporaries(generations):
        flags = photo_flags | {"num_generations": generations, "num_policy_timesteps": 1, "log_freq": 100}
        setup = set_up(make_automatic_config(**flags))
        step = make_train_step(setup.objective, setup.optimizer, setup.step_settings)
        program = setup.partitioner.compile(step, setup.state, setup.frozen, next(setup.batches()))
        latents = 4 * 32 * setup.loaded.model.latent_features * 2  # bytes of one sample of each condition
        return program.memory_analysis().temp_size_in_bytes, latents

    (few, latents), (many, _) = temporaries(2), temporaries(8)
    assert many - few < 6 * 4 * latents


def test_caches_are_cleared_once_per_program_and_not_during_compilation(make_automatic_config, monkeypatch):
    setup, compilation_may_end, platforms = set_up(make_automatic_config()), threading.Event(), []
    monkeypatch.setattr(programs, "clear_jit_caches", platforms.append)

    def compile_(self, *_):
        return compilation_may_end.wait(60) and Compiled(setup.step_settings)

    monkeypatch.setattr(programs.CompiledSteps, "_compile_with_rewards", compile_)
    step, batch = setup.compiled_steps(), next(setup.batches())
    step.clear_jit_caches()
    step.prepare(setup.state, setup.frozen, batch)
    step.clear_jit_caches()
    assert platforms == []
    compilation_may_end.set()
    step(setup.state, setup.frozen, batch)
    step.clear_jit_caches()
    step.clear_jit_caches()
    assert platforms == ["cpu"]
