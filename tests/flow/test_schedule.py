"""Compares sampling times with diffusers' scheduler, and the distributions of training times with closed forms."""

import json
import math
from importlib.util import find_spec
from itertools import pairwise

import jax
import numpy as np
import pytest

from ra_jax.flow.schedule import FlowSchedule, stratified_times
from ra_jax.interop.diffusers import FLUX_SCHEDULER

if find_spec("torch"):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift

DYNAMIC = {key: value for key, value in FLUX_SCHEDULER.items() if not key.startswith("_")}
STATIC = DYNAMIC | {"use_dynamic_shifting": False}
OTHER = {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 0.9, "max_image_seq_len": 2048, "shift": 2.0}

# (height, width) in pixels -> tokens, for an image and for diptychs with panels of 512² and 1024² pixels. The last
# number of tokens exceeds max_image_seq_len.
SIZES = {(256, 192): 192, (512, 1024): 2048, (1024, 2048): 8192}


def diffusers_times(scheduler, steps: int, tokens: int) -> np.ndarray:
    config = scheduler.config
    names = "base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"
    mu = calculate_shift(tokens, *(config[name] for name in names))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    np.testing.assert_allclose(scheduler.timesteps / 1000, scheduler.sigmas[:-1], rtol=1e-6)
    return scheduler.sigmas.numpy()


@pytest.mark.torch
@pytest.mark.parametrize("settings", [DYNAMIC, STATIC, OTHER, {}], ids=["FLUX", "static", "other", "diffusers' own"])
def test_sampling_times_of_a_scheduler_folder_match_diffusers(settings, tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.save_pretrained(tmp_path / "scheduler")
    schedule = FlowSchedule.from_folder(tmp_path)
    for (height, width), tokens in SIZES.items():
        assert tokens == (height // 16) * (width // 16)
        for steps in (1, 5, 28):
            times = schedule.sampling_times(steps, tokens)
            assert times.dtype == np.float32
            np.testing.assert_allclose(times, diffusers_times(scheduler, steps, tokens), rtol=1e-6, atol=1e-7)


@pytest.mark.torch
def test_missing_values_of_a_scheduler_folder_are_diffusers_defaults(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps({"num_train_timesteps": 1000}))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    times = FlowSchedule.from_folder(tmp_path).sampling_times(4, 1024)
    np.testing.assert_allclose(times, diffusers_times(scheduler, 4, 1024), rtol=1e-6)


@pytest.mark.parametrize("change", [{"shift_terminal": 0.02}, {"time_shift_type": "linear"}, {"use_beta_sigmas": True}])
def test_unsupported_schedules_are_refused(change, tmp_path):
    (name,) = change
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(DYNAMIC | change))
    with pytest.raises(ValueError, match=rf"scheduler_config.json: {name} is .*, but only .* is supported"):
        FlowSchedule.from_folder(tmp_path)


def test_a_folder_without_a_scheduler_gets_the_values_of_flux(tmp_path):
    values = {name: value for name, value in vars(FlowSchedule.from_folder(tmp_path)).items() if name in DYNAMIC}
    assert values == {name: value for name, value in DYNAMIC.items() if name != "num_train_timesteps"}


def test_zero_sampling_steps_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps=0: a sampler needs at least 1 step"):
        FlowSchedule().sampling_times(0, 256)


@pytest.mark.torch
@pytest.mark.parametrize("tokens", [128, 8192])
@pytest.mark.parametrize("dynamic", [True, False])
def test_training_times_are_logit_normal_around_the_shift(tokens, dynamic):
    """Warping adds μ (or log s) to the logit, so logit(t) − μ ~ N(0, 1): a Kolmogorov-Smirnov test at p = 0.001."""
    schedule = FlowSchedule(use_dynamic_shifting=dynamic)
    count = 4000
    times = jax.vmap(lambda key: schedule.draw_training_time(key, tokens))(jax.random.split(jax.random.key(0), count))
    assert times.dtype == np.float32
    times = np.sort(np.asarray(times, np.float64))
    assert 0 < times[0] < times[-1] < 1
    center = calculate_shift(tokens) if dynamic else math.log(schedule.shift)
    normal = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in np.log(times / (1 - times)) - center])
    steps = np.arange(count + 1) / count
    distance = max(np.abs(normal - steps[1:]).max(), np.abs(normal - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(count)


def test_stratified_times_fill_equal_parts_of_the_noisiest_fraction():
    count, fraction = 4, 0.7
    keys = jax.random.split(jax.random.key(0), 2000)
    times = np.asarray(jax.vmap(lambda key: stratified_times(key, count, fraction))(keys))
    edges = 1 - fraction * np.arange(count + 1) / count
    assert times.shape == (2000, count)
    for k in range(count):
        stratum = times[:, k]
        assert edges[k + 1] - 1e-6 <= stratum.min() < stratum.max() <= edges[k] + 1e-6
        middle, width = (edges[k] + edges[k + 1]) / 2, fraction / count
        assert abs(stratum.mean() - middle) < 4 * width / math.sqrt(12 * 2000)
        assert abs(stratum.std() - width / math.sqrt(12)) < 0.05 * width
    offsets = (edges[:-1] - times) / (fraction / count)
    correlation = np.corrcoef(offsets.T) - np.eye(count)
    assert np.abs(correlation).max() < 0.1  # the draws of the parts are independent


@pytest.mark.parametrize("schedule", [FlowSchedule(), FlowSchedule(use_dynamic_shifting=False)])
def test_density_of_training_times_is_that_of_the_draws(schedule):
    keys = jax.random.split(jax.random.key(0), 40_000)
    times = np.asarray(jax.jit(jax.vmap(lambda key: schedule.draw_training_time(key, 1000)))(keys))
    counts, edges = np.histogram(times, bins=20, range=(0, 1))
    centers = np.linspace(0, 1, 2001)[1:-1]
    density = schedule.training_density(centers, 1000)
    expected = [density[(centers >= low) & (centers < high)].sum() / 2000 for low, high in pairwise(edges)]
    np.testing.assert_allclose(counts / len(times), expected, atol=0.01)
