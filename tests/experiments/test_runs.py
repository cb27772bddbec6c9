"""Every experiment runs from start to end at a tiny size, on a base with random weights."""

import json
import shutil
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.checkpoints import Checkpoints
from ra_jax.data.synthetic import DatasetSettings, write_dataset
from ra_jax.demo.prepare import DemoSettings

MODEL = """
train_json_path = "none"
output_dir = "none"
aspect_ratio_buckets = "32,32"
max_sequence_length = 8
mask_augmentation = false
mixed_precision = "no"
gradient_checkpointing = "none"
use_lora = true
num_experts = 2
lora_rank = 2
lora_alpha = 2.0
target_modules = '.*\\.to_q'
use_grpo = true
enable_grpo_rewards = true
enable_grpo_loss = true
num_policy_timesteps = 1
train_batch_size = 8
learning_rate = 0.01
data_workers = 0
validation_steps = 0
report_to = ["none"]
"""
CONFIGS = {
    "human": MODEL + "use_human_scores = true\n",
    "automatic": MODEL + "num_generations = 2\nrollout_steps = 2\ndecode_batch_size = 8\n",
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Configurations of a human-scored and of an automatic run, as TOML files by name."""
    folder = tmp_path_factory.mktemp("configs")
    for name, text in CONFIGS.items():
        (folder / f"{name}.toml").write_text(text)
    return {name: folder / f"{name}.toml" for name in CONFIGS}


@pytest.fixture(scope="module")
def make_demo(tiny_fill, tiny_redux, scored_scenes):
    """make_demo(folder, settings): write the files that `prepare` would make, with a base of random weights."""

    def make(folder, settings=None):
        settings = settings or DemoSettings()
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text(json.dumps(asdict(settings)))
        parts = {"tiny_flux_fill": tiny_fill, "tiny_redux": tiny_redux}
        for part, source in (parts | {"data/train": scored_scenes, "data/held_out": scored_scenes}).items():
            shutil.copytree(source, folder / part)

    return make


@pytest.fixture
def restore_cache():
    """Restore the folder of JAX's compilation cache, which the experiments change."""
    folder = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", folder)


def test_human_scores(load_experiment, configs, make_demo, restore_cache, tmp_path, capsys):
    module = load_experiment("human_scores")
    experiment = module.Experiment(
        root=tmp_path,
        config=configs["human"],
        mixes=("no_clean",),
        methods=("grpo",),
        seeds=(0,),
        steps=2,
        held_out=3,
        num_inference_steps=1,
    )
    make_demo(tmp_path / "no_clean", experiment.demo_settings("no_clean"))
    module.run(experiment)
    names = {path.stem for path in (tmp_path / "cells").iterdir()}
    assert names == {f"no_clean-{name}-0" for name in ("base", "roundtrip", "grpo")}
    before = json.loads(experiment.cell_file("no_clean", "grpo", 0).read_text())
    assert before["steps"] == 2 and np.shape(before["defects"]) == (3, 4)
    # A finished cell is skipped, also if it has the former name of a setting; another setting is refused.
    cell = experiment.cell_file("no_clean", "grpo", 0)
    text = cell.read_text()
    assert '"routing_specialization": 0.5' in text
    cell.write_text(text.replace("routing_specialization", "routing_specialisation"))
    module.run(experiment)
    cell.write_text(text.replace('"routing_specialization": 0.5', '"routing_specialization": 0.25'))
    with pytest.raises(SystemExit, match=r"other settings.*'routing_specialization': \(0.25, 0.5\)"):
        module.run(experiment)
    cell.write_text(text)
    module.measure_again(experiment)
    assert json.loads(experiment.cell_file("no_clean", "grpo", 0).read_text()) == before
    capsys.readouterr()
    module.table(experiment)
    printed = capsys.readouterr().out
    assert "| human-scored GRPO | 1 | 2 |" in printed and (tmp_path / "no_clean.png").exists()


def test_automatic_rewards(load_experiment, configs, make_demo, restore_cache, tmp_path, capsys):
    module = load_experiment("automatic_rewards")
    experiment = module.Experiment(
        root=tmp_path / "output",
        demo=tmp_path / "demo",
        config=configs["automatic"],
        methods=("chance",),
        seeds=(0,),
        steps=4,
        points=2,
        held_out=4,
        num_inference_steps=1,
    )
    make_demo(experiment.demo)
    module.run(experiment)
    points = json.loads(experiment.cell_file("chance", 0).read_text())["points"]
    assert [point["step"] for point in points] == [2, 4]
    assert np.shape(points[0]["scores"]) == (4, 3) and np.shape(points[0]["defects"]) == (4, 4)
    capsys.readouterr()
    module.table(experiment)
    assert "| chance | 1 | 4 |" in capsys.readouterr().out and (experiment.root / "flawed.png").exists()
    checkpoints = Checkpoints(experiment.run_dir("contrast", 0))
    checkpoints.save(4, {"strength": {"strength": jnp.asarray(2.5)}}, position=4, config={}, base="")
    checkpoints.close()
    config = module.training_config(experiment, module.DemoPaths(experiment.demo), "contrast_chance", 0, 4)
    assert config.grpo.policy_strength == 2.5 and config.rollouts.reward_functions == ("automatic_rewards:chance",)


def test_two_sources(load_experiment, configs, make_demo, scored_scenes, tmp_path, monkeypatch, capsys):
    module = load_experiment("two_sources")
    monkeypatch.setattr(module, "CONFIGS", configs)
    monkeypatch.setattr(module, "SCENES", (100_000, 4))
    monkeypatch.setattr(module, "NUM_INFERENCE_STEPS", 1)
    make_demo(tmp_path / "demo")
    module.train(module.Training(root=tmp_path / "output", demo=tmp_path / "demo", steps=1))
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in ("none: the base", "human", "automatic"))
    module.agree(scored_scenes)
    assert "24 scored results of 6 scenes" in capsys.readouterr().out


def test_routing(load_experiment, configs, make_demo, tmp_path, capsys):
    module = load_experiment("routing")
    make_demo(tmp_path / "demo")
    folders = tmp_path / "demo" / "tiny_flux_fill", tmp_path / "demo" / "tiny_redux"
    loaded = load_experiment("held_out").load_base(*folders, configs["human"])
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, {"trainable": loaded.trainable}, position=0, config={}, base=loaded.fingerprint)
    checkpoints.close()
    shutil.copy(configs["human"], tmp_path / "run" / "config.toml")
    with pytest.raises(SystemExit) as ended:
        module.main((tmp_path / "run",), demo=tmp_path / "demo", scenes=6)
    assert ended.value.code == 1  # the gates of a fresh router do not depend on the image, and its experts do nothing
    assert f"| {tmp_path / 'run'} | 1.00 0.00 | 0.50 0.50 | 0.000 | 0.00 |" in capsys.readouterr().out
    gates = np.asarray([[0.5, 0.5], [1.0, 0.0]])
    np.testing.assert_allclose(module.entropy(gates), [np.log(2), 0.0], atol=1e-9)
    contributions = np.asarray([[[[1.0, 0.0]], [[0.0, 2.0]]], [[[1.0, 1.0]], [[0.0, -3.0]]]])  # [2 experts, 2, 1, 2]
    assert module.cosines(contributions) == {(0, 1): pytest.approx((2**-0.5 - 1) / 2)}


def test_validate_rewards(load_experiment, scored_scenes, capsys):
    module = load_experiment("validate_rewards")
    assert module.main(module.Settings(scored_scenes)) in (0, 1)
    printed = capsys.readouterr().out
    assert "### with ground truth, 6 photos" in printed and "### without ground truth, 6 photos" in printed
    assert "ok   with ground truth: truth above source" in printed


def test_policy_at_rest(load_experiment, make_demo, restore_cache, tmp_path, monkeypatch, capsys):
    """Looks need held-out photos, and photos are held out of ten or more."""
    module = load_experiment("policy_at_rest")
    monkeypatch.setitem(module.TINY, "max_sequence_length", 8)
    monkeypatch.setitem(module.GUIDE, "target_modules", r".*\.to_q")
    experiment = module.Experiment(
        root=tmp_path / "output",
        demo=tmp_path / "demo",
        cells=("contrast", "best_of_group", "strength_2", "single"),
        steps=4,
        strength_steps=2,
        every=2,
        held_out=4,
        num_inference_steps=1,
        noise_seeds=2,
    )
    make_demo(experiment.demo)
    shutil.rmtree(experiment.paths.train)
    write_dataset(experiment.paths.train, DatasetSettings(scenes=12, size=32, mix="no_clean", seed=0))
    module.run(experiment)
    cells = {cell: json.loads(experiment.cell_file(cell, 0).read_text()) for cell in experiment.cells}
    assert [point["step"] for point in cells["contrast"]["points"]] == [-1, 2, 4]
    assert np.shape(cells["contrast"]["points"][0]["scores"]) == (4, 3)
    assert cells["best_of_group"]["strength"] is None
    assert cells["strength_2"]["strength"] == pytest.approx(2 * cells["contrast"]["strength"], rel=1e-6)
    assert len(json.loads((tmp_path / "output" / "single.json").read_text())) == 12
    # Different noise gives different removals.
    assert cells["contrast"]["spread"]["base"]["pixel_std"] > 0.0
    capsys.readouterr()
    module.table(experiment)
    printed = capsys.readouterr().out
    assert "| contrast | 0 | people |" in printed and "contrast minus best_of_group, truth:" in printed
    assert "| 2 | " in printed and "| 1 | " in printed  # strengths relative to auto's
    assert (tmp_path / "output" / "rest.png").exists() and (tmp_path / "output" / "strength.png").exists()
