"""Looks: which scenes they show, what they compare removals with, and their scores."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.data.diptych import right_panel
from ra_jax.inference.sampling import as_diptych, initial_noise, make_remover
from ra_jax.rewards.registry import REWARDS, RewardInputs
from ra_jax.training.setup import set_up
from ra_jax.training.step.state import example_keys, stream_key

FLAGS = {"validation_steps": 1, "validation_scenes": 2, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def with_truth(make_config_in, scored_scenes, tmp_path_factory):
    """The set-up of a run whose held-out records are pairs."""
    folder = tmp_path_factory.mktemp("truth")
    return set_up(make_config_in(folder, val_json_path=str(scored_scenes / "triplets.json"), **FLAGS))


def test_removals_are_those_of_inference_and_are_compared_with_the_truth(with_truth):
    setup, looks = with_truth, with_truth.held_out._looks
    look = looks.take(0, setup.state.trainable, setup.frozen)
    remove = make_remover(setup.loaded.model, setup.objective.schedule, num_inference_steps=2, guidance_scale=30.0)
    scores = []
    for batch in looks._batches:
        keys = example_keys(stream_key(0, "previews"), batch["record_id"])
        images, _ = remove(setup.state.trainable, setup.frozen, batch, initial_noise(setup.loaded.model, keys, 32, 32))
        diptych = as_diptych(batch, "result")
        decoded = setup.loaded.model.decode(setup.frozen, setup.loaded.model.encode(setup.frozen, diptych), (4, 8))
        inputs = RewardInputs(
            image=images,
            source=batch["source"] / np.float32(255),
            mask=batch["mask"].astype(np.float32),
            target=right_panel(diptych),
            target_decoded=jnp.clip(right_panel(decoded), 0, 1),
        )
        scores.append([float(REWARDS[name].function(inputs)[0]) for name in ("removal", "background", "smoothness")])
    assert len(scores) == 2
    np.testing.assert_allclose(list(look.scores.values()), np.mean(scores, 0), atol=1e-3)
    expected = np.asarray([0.4, 0.3, 0.3]) @ (2 * np.mean(scores, 0) - 1)
    assert look.reward == pytest.approx(expected, abs=2e-3)
    assert look.preview.name == "step_000000.png" and look.seconds > 0


def test_candidates_are_scored_without_truth(make_config, scored_scenes, tmp_path):
    records = json.loads((scored_scenes / "labeled_dict.json").read_text())
    for record in records:
        for name in ("src", "mask", "ref", "result"):
            record[name] = str(scored_scenes / record[name])
    path = tmp_path / "candidates.json"
    path.write_text(json.dumps(records))
    looks = set_up(make_config(val_json_path=str(path), **FLAGS)).held_out._looks
    assert looks.are_scored and not looks._settings.with_truth


def test_without_held_out_photos_there_are_previews_but_no_scores(make_config, caplog):
    setup = set_up(make_config(**FLAGS))
    assert not setup.held_out.chooses_best
    assert "no photo is held out (6 photos, validation_split = 0.1)" in caplog.text
    look = setup.held_out._looks.take(0, setup.state.trainable, setup.frozen)
    assert look.reward is None and look.metrics() == {} and look.preview.exists()
