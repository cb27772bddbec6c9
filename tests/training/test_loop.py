"""Whole runs: outputs, exact resume after a kill, SIGTERM, experts in the pipeline, and errors."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ra_jax.checkpoints import find_checkpoint, read_metadata, restore
from ra_jax.config.parse import from_flat_dict, load_toml
from ra_jax.data.loader import Loader
from ra_jax.errors import CheckpointError, ConfigError, DataError
from ra_jax.parallel.partitioning import named_leaves
from ra_jax.pipeline import RemovalPipeline
from ra_jax.reporting.trackers import read_rows
from ra_jax.run_folder import CONFIG_FILE, RUN_FILES, RUN_FOLDERS, prepare_output_dir
from ra_jax.training.loop import Recorder, train
from ra_jax.training.setup import set_up

CLOCK = {"step_time", "data_wait", "images_per_second", "tflops_per_second_per_device"}
RUN = {"max_train_steps": 6, "checkpointing_steps": 3, "ema_decay": 0.9}


def rows(folder):
    return [
        {name: value for name, value in row.items() if name not in CLOCK} for row in read_rows(folder / "metrics.jsonl")
    ]


def final_state(folder, config):
    like = set_up(config).state
    return {name: np.asarray(leaf) for name, leaf in named_leaves(restore(find_checkpoint(folder), like)).items()}


@pytest.fixture(scope="module")
def straight(make_config_in, tmp_path_factory):
    """The folder of an uninterrupted run of six steps with previews."""
    config = make_config_in(
        tmp_path_factory.mktemp("straight"),
        validation_steps=3,
        num_inference_steps=2,
        num_validation_images=2,
        report_to=["tensorboard"],
        **RUN,
    )
    return train(config)


def test_a_run_writes_all_of_its_outputs(straight):
    assert [row["step"] for row in read_rows(straight / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    last = read_rows(straight / "metrics.jsonl")[-1]
    promised = {"train_loss", "lr", "base_loss", "policy_loss", "diversity_loss", "mean_reward", "mean_ratio"}
    promised |= {f"routing_expert_{i}_usage" for i in range(3)} | {f"routing_expert_{i}_weight" for i in range(3)}
    promised |= {"reward_std", "clip_fraction", "approx_kl", "frac_reward_zero_std", "grad_norm", "removal_score"}
    promised |= {"background_score", "smoothness_score", "velocity_norm_ratio", *CLOCK}
    assert promised <= last.keys()
    assert sorted(path.name for path in (straight / "previews").iterdir()) == [f"step_00000{n}.png" for n in (0, 3, 6)]
    assert Image.open(straight / "curves.png").size[0] > 500
    assert list((straight / "tensorboard").iterdir())
    assert {path.name for path in straight.iterdir()} == {*RUN_FOLDERS, *RUN_FILES, CONFIG_FILE} - {
        "wandb",
        "best",
        "reference",
    }


def test_previews_show_four_panels_a_scene_and_change(straight):
    first, last = (np.asarray(Image.open(straight / "previews" / f"step_00000{n}.png")) for n in (0, 6))
    assert first.shape == (2 * 100 + 4, 4 * 100 + 4, 3)  # panels of 32 pixels, enlarged to 96
    assert not np.array_equal(first, last)


def test_killed_run_resumes_bit_for_bit(straight, make_config, interrupt_at):
    """The run dies at step 5, after the checkpoint of step 3. Steps 4 and 5 are repeated and their rows replaced."""
    interrupt_at(5, lambda: train(make_config(**RUN)))
    resumed = make_config(resume_from_checkpoint="latest", **RUN)
    folder = train(resumed)
    assert rows(folder) == rows(straight)
    ours, theirs = final_state(folder, resumed), final_state(straight, resumed)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def end_by_sigterm(config):
    """Train until a SIGTERM, which the test sends, ends the run after step 2; return the run's folder."""
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert find_checkpoint(config.run.output_dir).name == "2"
    return Path(config.run.output_dir)


def test_sigterm_while_a_row_is_written_still_saves(make_config, monkeypatch):
    flush = Recorder.flush

    def terminated(self, done, metrics):
        flush(self, done, metrics)
        if done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "flush", terminated)
    end_by_sigterm(make_config(**RUN))


def test_sigterm_saves_and_exits(straight, make_config, monkeypatch):
    iterate = Loader.iterate

    def terminated(self, start=0):
        for i, batch in enumerate(iterate(self, start)):
            if start + i == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Loader, "iterate", terminated)
    assert rows(end_by_sigterm(make_config(**RUN))) == rows(straight)[:2]


def test_trained_experts_load_into_the_pipeline(straight, tiny_fill, tiny_redux, scored_scenes):
    pipe = RemovalPipeline.from_pretrained(tiny_fill, tiny_redux, straight, dtype="float32")
    image = Image.open(scored_scenes / "input" / "scene_00000.png")
    mask = Image.open(scored_scenes / "mask" / "scene_00000.png")
    trained = pipe(image, mask, num_inference_steps=2, num_images=2)
    assert trained.gates.shape == (2, 3)
    np.testing.assert_allclose(trained.gates.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(trained.gates[0], trained.gates[1])
    base = RemovalPipeline.from_pretrained(tiny_fill, tiny_redux, dtype="float32", max_sequence_length=8)
    plain = base(image, mask, num_inference_steps=2, num_images=1)
    assert not np.array_equal(np.asarray(plain.images[0]), np.asarray(trained.images[0]))


def test_experts_load_if_their_tracker_is_not_installed(straight, tiny_fill, tiny_redux, monkeypatch):
    def tracked_by_wandb(checkpoint):
        about = read_metadata(checkpoint)
        return replace(about, config=about.config | {"report_to": ["wandb"]})

    monkeypatch.setattr("ra_jax.pipeline.read_metadata", tracked_by_wandb)
    monkeypatch.setattr("ra_jax.config.checks.find_spec", lambda name: None)
    RemovalPipeline.from_pretrained(tiny_fill, tiny_redux, straight, dtype="float32")


def test_another_run_in_the_folder_is_refused_and_kept(straight, make_config_in):
    before = (straight / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume_from_checkpoint latest"):
        train(make_config_in(straight.parent))
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_written_configuration_can_resume_a_run_that_overwrote_another(make_config, tmp_path):
    prepare_output_dir(make_config(overwrite_output_dir=True), tmp_path, keep=False)
    written = load_toml(tmp_path / "config.toml")
    assert from_flat_dict(written | {"resume_from_checkpoint": "latest"}).run.resume_from_checkpoint == "latest"


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(make_config, tmp_path):
    config = make_config(overwrite_output_dir=True)
    prepare_output_dir(config, tmp_path, keep=False)
    for folder in ("checkpoints", "removed"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").touch()
    prepare_output_dir(config, tmp_path, keep=False)
    assert not (tmp_path / "checkpoints").exists()
    assert (tmp_path / "removed" / "file").exists()


def test_invalid_data_leaves_an_overwritten_run_unchanged(straight, make_config_in, tmp_path):
    """`--overwrite_output_dir` deletes files only after the checks of data and model."""
    (tmp_path / "bad.json").write_text(json.dumps([{"src": "missing.png", "mask": "missing.png"}]))
    with pytest.raises(DataError):
        train(make_config_in(straight.parent, overwrite_output_dir=True, train_json_path=str(tmp_path / "bad.json")))
    assert (straight / "metrics.jsonl").exists()


def test_invalid_preview_data_leave_an_overwritten_run_unchanged(straight, make_config_in):
    with pytest.raises(DataError, match=r"nowhere.json: no such file"):
        train(make_config_in(straight.parent, overwrite_output_dir=True, val_json_path="nowhere.json"))
    assert (straight / "metrics.jsonl").exists()


def test_resuming_from_an_earlier_checkpoint_of_the_folder_is_refused(straight, make_config_in):
    """Checkpoint 6 would remain and look like the latest checkpoint of the run that resumes from 3."""
    config = make_config_in(straight.parent, resume_from_checkpoint=str(straight / "checkpoints" / "3"), **RUN)
    with pytest.raises(ConfigError, match=r"3 is not the latest checkpoint of the run in output_dir .*choose another"):
        train(config)


def test_an_earlier_checkpoint_resumes_in_another_folder(straight, make_config):
    setup = set_up(make_config(resume_from_checkpoint=str(straight / "checkpoints" / "3"), **RUN))
    assert setup.first_step == 3


def test_scores_of_weight_0_are_refused_before_the_model_is_loaded(make_config, scored_scenes, tmp_path):
    records = json.loads((scored_scenes / "labeled_tensor.json").read_text())
    for record in records:
        record |= {name: str(scored_scenes / record[name]) for name in ("ref", "src", "mask", "result")}
        record["scores"] = [0.0, 0.0, 0.0]
    (tmp_path / "zero.json").write_text(json.dumps(records))
    config = make_config(
        train_json_path=str(tmp_path / "zero.json"), score_format="tensor", pretrained_model_name_or_path="nowhere"
    )
    with pytest.raises(DataError, match=r"zero.json: base_loss_weighting='score' gives every record weight 0"):
        train(config)


def test_checkpoint_of_another_geometry_is_refused(straight, make_config):
    config = make_config(resume_from_checkpoint=str(straight), lora_rank=4, lora_alpha=4.0, **RUN)
    with pytest.raises(CheckpointError, match=r"another geometry[\s\S]*lora_a"):
        train(config)


def test_checkpoint_of_another_base_is_refused(straight, make_config, make_tiny_fill):
    other = make_config(
        resume_from_checkpoint=str(straight), pretrained_model_name_or_path=str(make_tiny_fill(2)), **RUN
    )
    with pytest.raises(CheckpointError, match="another base"):
        train(other)


def test_resuming_with_another_seed_is_refused_before_the_model_is_loaded(straight, make_config):
    config = make_config(resume_from_checkpoint=str(straight), seed=7, pretrained_model_name_or_path="nowhere", **RUN)
    with pytest.raises(ConfigError, match=r"seed 7: the run of checkpoint .* was started with seed 0.*give --seed 0"):
        train(config)


def test_resuming_applies_another_temperature_and_warns_of_another_batch_and_base(straight, make_config, caplog):
    settings = RUN | {"policy_temperature": 0.3, "train_batch_size": 2, "base_precision": "int8"}
    setup = set_up(make_config(resume_from_checkpoint=str(straight), **settings))
    np.testing.assert_allclose(setup.state.temperature, 0.3, rtol=1e-6)
    assert "train_batch_size is 2, and was" in caplog.text
    assert re.search(r"base_precision is int8, and was \w+ in the checkpoint: .*, but its base", caplog.text)


def test_the_error_for_a_missing_checkpoint_names_it(make_config, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere"):
        train(make_config(resume_from_checkpoint=str(tmp_path / "nowhere")))


def test_resume_latest_without_a_checkpoint_starts_at_step_0(make_config):
    config = make_config(resume_from_checkpoint="latest", **RUN)
    assert set_up(config).first_step == 0


def test_human_scores_with_triplets_are_refused(make_config, scored_scenes):
    with pytest.raises(DataError, match="use_human_scores=True but no 'scores' field found in data"):
        train(make_config(train_json_path=str(scored_scenes / "triplets.json")))


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(make_config, monkeypatch):
    """Before it stops, JAX's caches have been cleared once."""
    platforms = []
    monkeypatch.setattr("ra_jax.training.programs.clear_jit_caches", platforms.append)
    config = make_config(learning_rate=1e30, max_train_steps=6, checkpointing_steps=1, ema_decay=0.9)
    with pytest.raises(FloatingPointError, match=r"train_loss is nan at step \d.*lower --learning_rate"):
        train(config)
    assert platforms == ["cpu"]
    assert find_checkpoint(config.run.output_dir).name == "1"
