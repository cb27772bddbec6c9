"""The strength of the estimator contrast: chosen before the first step, kept in the state, and restored."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ra_jax.checkpoints import restore
from ra_jax.errors import CheckpointError, ConfigError, DataError
from ra_jax.parallel.partitioning import named_leaves
from ra_jax.rl.strength import LossWeights, ScoreDeviations, choose_strength, policy_weights, strength_table
from ra_jax.training.loop import RunCheckpoints, train
from ra_jax.training.setup import set_up

AUTO = {"policy_strength": "auto", "policy_loss_weight": 0.1}


def test_human_mode_chooses_the_strength_from_the_scores_and_prints_the_table(make_config, caplog):
    with caplog.at_level(logging.INFO):
        setup = set_up(make_config(**AUTO))
    values = setup.loader._extras
    guide = LossWeights(base=1.0, policy=0.1, kl=0.0)
    scores = values["scores"].reshape(6, 4, 3)  # scenes of four results
    deviations = (scores - scores.mean(1, keepdims=True)).reshape(24, 3)
    compared = ScoreDeviations(np.arange(24), deviations)
    table = strength_table("abc", scores.mean((0, 1)), compared, values["advantage"], values["sample_weight"], guide)
    expected = choose_strength(table, np.asarray([0.4, 0.3, 0.3]))
    assert float(setup.state.strength.strength) == pytest.approx(expected, rel=1e-6)
    assert float(setup.state.strength.pull) == pytest.approx(4 * expected, rel=1e-6)
    assert f"policy_strength = {expected:.3g} (pull" in caplog.text
    assert "removal" in caplog.text and "expected" in caplog.text


def test_automatic_mode_measures_rollouts_of_the_initial_weights(make_automatic_config, caplog):
    with caplog.at_level(logging.INFO):
        setup = set_up(make_automatic_config(validation_scenes=4, **AUTO))
    strength = setup.state.strength
    assert "scores of 12 rollouts of 4 scenes" in caplog.text
    assert float(strength.pull) == pytest.approx(4 * float(strength.strength), rel=1e-6)
    assert float(strength.strength) not in (0.0, 1.0)


def test_a_number_is_the_strength(make_config, make_automatic_config):
    for make in (make_config, make_automatic_config):
        strength = set_up(make(policy_strength=2.5, policy_loss_weight=0.2, base_loss_weight=0.5)).state.strength
        expected = policy_weights(2.5, LossWeights(base=0.5, policy=0.2, kl=0.0))
        for name in ("strength", "pull", "anchor"):
            assert float(getattr(strength, name)) == pytest.approx(float(getattr(expected, name)))


def test_without_results_the_anchor_has_the_whole_hold(make_automatic_config, photo_flags):
    strength = set_up(make_automatic_config(policy_strength=4.0, **photo_flags)).state.strength
    assert float(strength.anchor) == pytest.approx(0.25)


@pytest.mark.parametrize("estimator", ["matching", "nft"])
def test_other_estimators_have_no_strength(make_config, estimator):
    assert set_up(make_config(policy_estimator=estimator)).state.strength is None


def test_scores_that_never_vary_are_refused(make_config, scored_scenes, tmp_path):
    records = json.loads((scored_scenes / "labeled_dict.json").read_text())
    for record in records:
        record["scores"] = dict.fromkeys(record["scores"], 0.5)
        for name in ("src", "mask", "ref", "result"):
            record[name] = str(scored_scenes / record[name])
    path = tmp_path / "equal.json"
    path.write_text(json.dumps(records))
    with pytest.raises(
        DataError, match=r"equal\.json: no score is higher in the better results.*several of each scene"
    ):
        set_up(make_config(train_json_path=str(path)))


def test_rollouts_with_equal_rewards_are_refused(make_automatic_config, tmp_path, monkeypatch):
    (tmp_path / "constant.py").write_text(
        "import jax.numpy as jnp\ndef half(x):\n    return jnp.full(len(x.image), 0.5)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = make_automatic_config(validation_scenes=2, reward_functions=["constant:half"], **AUTO)
    with pytest.raises(DataError, match=r"6 rollouts of 2 scenes: no score is higher .*; check --reward_functions"):
        set_up(config)


@pytest.fixture(scope="module")
def trained(make_config_in, tmp_path_factory):
    """A run of two steps with contrast: its configuration and folder."""
    config = make_config_in(tmp_path_factory.mktemp("contrast"), max_train_steps=2, **AUTO)
    return config, train(config)


def resumed(config, output, **changes):
    grpo = replace(config.grpo, **{name: value for name, value in changes.items() if hasattr(config.grpo, name)})
    losses = replace(config.losses, **{k: v for k, v in changes.items() if hasattr(config.losses, k)})
    folder = f"{output}-{len(list(output.parent.iterdir()))}"  # a new one each time
    run = replace(config.run, resume_from_checkpoint=str(output), output_dir=folder)
    return replace(config, grpo=grpo, losses=losses, run=run)


def test_a_resumed_run_keeps_the_strength_bit_for_bit(trained, caplog):
    config, output = trained
    with caplog.at_level(logging.INFO):
        setup = set_up(resumed(config, output))
    saved = restore(output / "checkpoints" / "2", setup.state)
    assert named_leaves(setup.state.strength) == named_leaves(saved.strength)
    assert setup.first_step == 2


@pytest.mark.parametrize("changes", [{"policy_strength": 2.0}, {"policy_loss_weight": 0.3}])
def test_a_resumed_run_may_change_the_strength_or_a_weight(trained, changes):
    config, output = trained
    before = set_up(resumed(config, output)).state.strength
    after = set_up(resumed(config, output, **changes)).state.strength
    strength = changes.get("policy_strength", float(before.strength))
    expected = policy_weights(strength, LossWeights(1.0, changes.get("policy_loss_weight", 0.1), 0.0))
    assert float(after.pull) == pytest.approx(float(expected.pull)) != float(before.pull)
    assert float(after.anchor) == pytest.approx(float(expected.anchor))


@pytest.mark.parametrize("estimator", ["matching", "nft"])
def test_resuming_with_another_estimator_is_refused(trained, estimator):
    config, output = trained
    with pytest.raises(
        ConfigError, match=f"policy_estimator = {estimator} .* trained with contrast, which has another"
    ):
        set_up(resumed(config, output, policy_estimator=estimator, policy_strength="auto"))


def shift(weights, by):
    return jax.tree.map(lambda x: x + by, weights)


def test_the_reference_of_new_experts_is_the_base_without_a_copy(make_config):
    assert "reference" not in set_up(make_config()).frozen


def test_the_reference_of_the_whole_transformer_is_a_copy_in_the_dtype_of_the_computation(make_config):
    setup = set_up(make_config(use_lora=False, mixed_precision="bf16"))
    reference, trained_leaves = named_leaves(setup.frozen["reference"]), named_leaves(setup.state.trainable)
    assert reference.keys() == trained_leaves.keys()
    assert {str(x.dtype) for x in reference.values()} == {"bfloat16"}
    assert (
        set_up(make_config(use_lora=False, policy_estimator="matching", overwrite_output_dir=True)).frozen.get(
            "reference"
        )
        is None
    )


@pytest.fixture(scope="module")
def continued(trained, make_config_in, tmp_path_factory):
    """A run of two steps that starts with the experts of `trained`: its configuration and folder."""
    folder = tmp_path_factory.mktemp("continued")
    config = make_config_in(folder, max_train_steps=2, init_experts_from=str(trained[1]), **AUTO)
    return config, train(config)


def test_the_reference_of_other_experts_is_a_copy_that_a_resumed_run_restores(trained, continued):
    config, output = continued
    like = set_up(replace(config, run=replace(config.run, output_dir=f"{output}-like"))).state.trainable
    initial = restore(trained[1] / "checkpoints" / "2", like, prefix="trainable")
    run = replace(
        config.run, init_experts_from=None, resume_from_checkpoint=str(output), output_dir=f"{output}-elsewhere"
    )
    setup = set_up(replace(config, run=run))
    reference = named_leaves(setup.frozen["reference"])
    for name, leaf in named_leaves(initial).items():
        np.testing.assert_array_equal(reference[name], leaf, err_msg=name)
    assert (output.with_name("run-elsewhere") / "reference" / "0").is_dir()
    assert setup.initial_experts == str(trained[1])
    moved = named_leaves(setup.state.trainable)
    assert any(not np.array_equal(moved[name], reference[name]) for name in reference)


def test_a_lost_reference_is_reported(continued, tmp_path):
    config, output = continued
    lost = tmp_path / "lost"
    (output / "reference").rename(lost)
    run = replace(config.run, init_experts_from=None, resume_from_checkpoint=str(output), output_dir=f"{output}-lost")
    try:
        with pytest.raises(CheckpointError, match=r"reference.0 is missing: the run of checkpoint .* started with"):
            set_up(replace(config, run=run))
    finally:
        lost.rename(output / "reference")


def test_matching_warns_of_results_that_it_pushes_away(make_config, caplog):
    set_up(make_config(policy_estimator="matching"))
    assert "policy_estimator matching pushes the model away from" in caplog.text
    caplog.clear()
    set_up(make_config(overwrite_output_dir=True))
    assert "pushes the model away" not in caplog.text


def test_scenes_with_one_result_are_named(make_config, scored_scenes, tmp_path, caplog):
    records = json.loads((scored_scenes / "labeled_dict.json").read_text())
    for record in records:
        for name in ("src", "mask", "ref", "result"):
            record[name] = str(scored_scenes / record[name])
    path = tmp_path / "few.json"
    path.write_text(json.dumps(records[:9]))  # two scenes of four results, and one of a single result
    set_up(make_config(train_json_path=str(path)))
    assert "1 of 3 scenes (33 %) have a single result" in caplog.text


def test_the_size_of_checkpoints_and_the_room_on_the_disk_are_told(trained, caplog, monkeypatch):
    config, output = trained
    setup = set_up(resumed(config, output))
    with caplog.at_level(logging.INFO):
        RunCheckpoints(config, setup).close()
    size = sum(x.nbytes for x in jax.tree.leaves(setup.state)) / 1e9
    assert f"a checkpoint takes {size:.3g} GB, and the run needs room for up to 0; {output}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        RunCheckpoints(config, replace(setup, total_steps=1)).close()  # the run was longer than it is to be now
    assert "room for up to 0;" in caplog.text
    caplog.clear()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    longer = replace(setup, total_steps=setup.total_steps + 5)
    RunCheckpoints(config, longer).close()
    assert caplog.records[-1].levelname == "WARNING" and "raise --checkpointing_steps" in caplog.text
