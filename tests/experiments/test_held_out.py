"""Removals of held-out scenes compared with the pipeline, measurements of known errors, and bootstrap intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.checkpoints import Checkpoints
from ra_jax.data.loader import Loader, LoaderOptions
from ra_jax.data.records import load_records
from ra_jax.data.synthetic import apply_defects
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.inference.sampling import initial_noise, make_remover
from ra_jax.interop.diffusers import load_vae
from ra_jax.training.step.state import example_keys, stream_key

SETTINGS = """
train_json_path = "none"
output_dir = "none"
max_sequence_length = 8
guidance_scale = 25.0
use_lora = true
num_experts = 2
lora_rank = 2
lora_alpha = 2.0
target_modules = '.*\\.(to_q|to_add_out|proj_mlp)'
"""
STEPS = 2


@pytest.fixture(scope="module")
def held_out(load_experiment):
    module = load_experiment("held_out")
    module.BATCH_SIZE = 2
    return module


@pytest.fixture(scope="module")
def base(tiny_fill, tiny_redux, tmp_path_factory):
    """Folders (fill, redux) of the tiny base, and the configuration of a run with two experts."""
    config = tmp_path_factory.mktemp("config") / "tiny.toml"
    config.write_text(SETTINGS)
    return tiny_fill, tiny_redux, config


@pytest.fixture(scope="module")
def scenes(held_out):
    """Three scenes, more than one batch of the remover."""
    return held_out.make_scenes(100_000, 3)


@pytest.fixture(scope="module")
def weights(held_out, base):
    """Weights of experts and router, changed so that the experts' output is not 0."""
    rng = np.random.default_rng(4)
    fresh = held_out.load_base(*base).trainable
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.3 * rng.normal(size=x.shape), x.dtype), fresh)


@pytest.fixture(scope="module")
def removals(held_out, base, scenes, weights):
    """Removals of the scenes with the experts of `weights`."""
    return held_out.generate_removals(*base, scenes, weights, num_inference_steps=STEPS)


def make_noise(model, count):
    keys = example_keys(stream_key(0, "held-out"), jnp.arange(count))
    return initial_noise(model, keys, 32, 32)


def decibels(error):
    return -10 * np.log10(error)


def test_scenes_are_the_demos_by_number(held_out):
    later, all_of_them = held_out.make_scenes(7, 2), held_out.make_scenes(6, 3)
    assert later.source.shape == (2, 32, 32, 3) and later.mask.shape == (2, 32, 32)
    for name in ("source", "truth", "reference", "mask"):
        np.testing.assert_array_equal(getattr(later, name), getattr(all_of_them, name)[1:])


def test_panels_are_what_the_loader_makes_of_the_same_scenes_on_disk(held_out, base, scored_scenes):
    preprocess = held_out.load_base(*base).preprocess
    records = load_records(scored_scenes / "triplets.json")  # scenes 0 to 5
    options = LoaderOptions(len(records), ((32, 32),), seed=0, multiple=8, preprocess_reference=preprocess)
    batch = next(Loader(records, options).iterate())
    panels = held_out.make_panels(held_out.make_scenes(0, len(records)), preprocess)
    assert set(panels) == {"source", "reference", "mask", "redux_pixels"}
    for name, rows in panels.items():
        assert rows.dtype == batch[name].dtype
        np.testing.assert_array_equal(rows[batch["record_id"]], batch[name])


def test_the_base_generates_what_the_pipeline_generates_step_by_step(held_out, base, scenes, tiny_pipeline):
    images = held_out.generate_removals(*base, scenes, num_inference_steps=STEPS)
    panels = held_out.make_panels(scenes, held_out.load_base(*base).preprocess)
    diptych = np.concatenate([panels["reference"], panels["source"]], axis=2).astype(np.float32) / 255
    mask = np.concatenate([0 * panels["mask"], panels["mask"]], axis=2)
    tokens = tiny_pipeline.redux(panels["redux_pixels"])
    prompt = jnp.zeros((3, 8, tokens.shape[-1]))
    condition = tiny_pipeline.condition(diptych, mask, jnp.concatenate([prompt, tokens], axis=1))
    latents = tiny_pipeline.denoise(make_noise(tiny_pipeline.model, 3), condition, STEPS, 25.0)
    expected = np.clip(tiny_pipeline.decode(latents, 32, 64)[:, :, 32:], 0, 1)
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.float32
    assert images.std() > 0.05
    np.testing.assert_allclose(images, expected, atol=1e-4)


def test_given_weights_generate_what_a_remover_generates_in_one_batch(held_out, base, scenes, weights, removals):
    loaded = held_out.load_base(*base)
    schedule = FlowSchedule.from_folder(base[0])
    remove = make_remover(loaded.model, schedule, num_inference_steps=STEPS, guidance_scale=25.0)
    panels = held_out.make_panels(scenes, loaded.preprocess)
    expected, _ = remove(weights, loaded.frozen, panels, make_noise(loaded.model, 3))
    np.testing.assert_allclose(removals, expected, atol=1e-5)
    of_the_base = held_out.generate_removals(*base, scenes, num_inference_steps=STEPS)
    assert np.abs(removals - of_the_base).max() > 0.02


def test_a_run_generates_by_its_latest_checkpoint_and_a_checkpoint_by_itself(
    held_out, base, scenes, weights, removals, tmp_path
):
    loaded, checkpoints = held_out.load_base(*base), Checkpoints(tmp_path)
    for step, trainable in enumerate((loaded.trainable, weights)):
        checkpoints.save(step, {"trainable": trainable}, position=0, config={}, base=loaded.fingerprint)
    checkpoints.close()
    latest = held_out.generate_removals(*base, scenes, tmp_path, num_inference_steps=STEPS)
    np.testing.assert_array_equal(latest, removals)
    first = held_out.generate_removals(*base, scenes, tmp_path / "checkpoints" / "0", num_inference_steps=STEPS)
    of_the_base = held_out.generate_removals(*base, scenes, num_inference_steps=STEPS)
    np.testing.assert_array_equal(first, of_the_base)


def test_the_ceiling_is_the_truth_through_the_vae(held_out, base, scenes):
    vae = load_vae(base[0])
    diptych = np.concatenate([scenes.reference, scenes.truth], axis=2)
    mean, _ = vae.encode(2 * diptych - 1)
    expected = np.clip((np.asarray(vae.decode(mean)) + 1) / 2, 0, 1)[:, :, 32:]
    decoded = held_out.decode_encoded_truth(*base, scenes)
    assert decoded.shape == scenes.truth.shape
    np.testing.assert_allclose(decoded, expected, atol=1e-4)


def test_the_truth_has_full_scores_and_no_defects(held_out, scenes):
    measured = held_out.measure_removals(scenes.truth, scenes)
    assert set(measured) == {"scores", "defects", "psnr_inside"}
    np.testing.assert_allclose(measured["scores"], np.ones((3, 3)), atol=1e-6)
    np.testing.assert_allclose(measured["defects"], np.zeros((3, 4)), atol=1e-6)
    np.testing.assert_allclose(measured["psnr_inside"], [100, 100, 100])


def test_strengths_of_defects_are_measured_with_their_signs(held_out, scenes):
    strengths = np.random.default_rng(0).uniform(-1, 1, (3, 4))
    measured = held_out.measure_removals(apply_defects(scenes, strengths), scenes)
    np.testing.assert_allclose(measured["defects"], strengths, atol=1e-4)
    assert (measured["scores"] < 0.999).all()


def test_psnr_inside_is_of_the_pixels_of_the_mask(held_out, scenes):
    inside = scenes.mask[..., None]
    red = np.array([0.1, 0, 0])
    image = scenes.truth + np.where(inside, red, 0.5)
    psnr = held_out.measure_removals(image, scenes)["psnr_inside"]
    np.testing.assert_allclose(psnr, 3 * [decibels(0.1**2 / 3)], rtol=1e-4)


def test_automatic_rewards_are_those_with_the_truth(held_out, scenes):
    image, decoded_truth = scenes.truth + np.float32(0.05), scenes.truth - np.float32(0.04)
    measured = held_out.measure_rewards(image, scenes, decoded_truth)
    psnr = decibels(0.05**2)
    np.testing.assert_allclose(measured["psnr"], 3 * [psnr], rtol=1e-4)
    removal, background, smoothness = measured["scores"].T
    np.testing.assert_allclose(removal, (psnr - 10) / 30, rtol=1e-4)
    np.testing.assert_allclose(background, (decibels(0.09**2) - 20) / 20, rtol=1e-3)
    assert measured["scores"].dtype == np.float64 and (smoothness >= 0).all() and (smoothness <= 1).all()
    of_the_truth = held_out.measure_rewards(scenes.truth, scenes, scenes.truth)
    np.testing.assert_array_equal(of_the_truth["scores"][:, :2], 1)
    np.testing.assert_allclose(of_the_truth["psnr"], [100, 100, 100])


def test_the_interval_of_constant_differences_is_the_constant(held_out):
    assert held_out.bootstrap_interval(np.full((3, 16), 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize("axis", [0, 1], ids=["seeds", "scenes"])
def test_seeds_and_scenes_are_both_drawn_with_replacement(held_out, axis):
    """Of two values, a sample draws the first twice with probability ¼, and the second twice with probability ¼."""
    values = np.moveaxis(np.broadcast_to([[-1.0], [1.0]], (2, 5)), 0, axis)
    assert held_out.bootstrap_interval(values) == (-1, 1)


def test_the_interval_of_negated_differences_is_negated(held_out):
    values = np.random.default_rng(2).exponential(size=(3, 20))
    low, high = held_out.bootstrap_interval(values)
    np.testing.assert_allclose(held_out.bootstrap_interval(-values), (-high, -low))
    assert low < values.mean() < high


def test_the_interval_of_a_mean_is_that_of_its_normal_distribution(held_out):
    values = np.random.default_rng(1).normal(2.0, 1.0, size=(1, 1000))
    expected = values.mean() + np.array([-1.96, 1.96]) / np.sqrt(1000)
    np.testing.assert_allclose(held_out.bootstrap_interval(values), expected, atol=0.01)


def test_the_interval_agrees_with_a_bootstrap_by_counts(held_out):
    """The reference draws how often each seed and each scene occurs: two independent multinomial counts."""
    rng = np.random.default_rng(3)
    by_seed, by_scene = rng.normal(size=(5, 1)), 2 * rng.normal(size=(1, 12))
    values = by_seed + by_scene + 0.5 * rng.normal(size=(5, 12))
    seeds, scenes = (rng.multinomial(n, np.full(n, 1 / n), size=100_000) / n for n in values.shape)
    means = np.einsum("bs,sn,bn->b", seeds, values, scenes)
    expected = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose(held_out.bootstrap_interval(values), expected, atol=0.1 * means.std())
