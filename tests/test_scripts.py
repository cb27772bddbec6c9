"""Experiments and benchmarks start from any folder and import no script but held_out; against_diffusers.py in detail.

tests/experiments/ runs the experiments at a tiny size.
"""

import ast
import importlib
import json
import os
import runpy
import sys
import venv
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ra_jax.rewards.custom import parse_rewards
from ra_jax.rewards.registry import RewardInputs

SCRIPTS = Path(__file__).parent.parent / "scripts"
PROGRAMS = sorted(path for folder in ("experiments", "benchmarks") for path in SCRIPTS.glob(f"{folder}/*.py"))
# contenders.py is started by against_diffusers.py; held_out.py is a module.
NO_COMMAND_LINE = ("contenders.py", "held_out.py")


@pytest.fixture(autouse=True)
def remove_scripts():
    """Remove imported scripts from sys.modules after each test, so that no test gets a module of another."""
    yield
    for path in PROGRAMS:
        sys.modules.pop(path.stem, None)


@pytest.fixture
def load_script(monkeypatch):
    """load_script(folder, name) -> the module of a script."""

    def load(folder, name):
        monkeypatch.syspath_prepend(SCRIPTS / folder)
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(
    "path", [path for path in PROGRAMS if path.name not in NO_COMMAND_LINE], ids=lambda path: path.name
)
def test_a_script_starts_from_any_folder(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(path.parent)  # as `python FILE` does
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []


def imported_names(tree):
    """The first part of each module that a file imports, in functions too: ra_jax for ra_jax.data.images."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):  # from . import script, from .script import name
            names |= {alias.name for alias in node.names} if node.module is None else set(node.module.split("."))
    return names


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import step", {"step"}),
        ("def f():\n    from human_scores import run as step", {"human_scores"}),
        ("from . import step\nfrom .demo import main", {"step", "demo"}),
        ("from ra_jax.demo import prepare", {"ra_jax"}),
    ],
)
def test_imports_of_scripts_are_found_wherever_they_are(code, names):
    assert imported_names(ast.parse(code)) == names


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_script_imports_no_other_script_but_held_out(path):
    scripts = {program.stem for program in PROGRAMS}
    assert imported_names(ast.parse(path.read_text(encoding="utf-8"))) & scripts <= {"held_out"} - {path.stem}


def test_training_finds_the_chance_reward_by_its_name(load_script):
    experiment = load_script("experiments", "automatic_rewards")
    (reward,) = parse_rewards(experiment.METHODS["chance"]["reward_functions"], (0.4, 0.3, 0.3), False)
    image = jax.random.uniform(jax.random.key(0), (64, 8, 8, 3))
    values = reward.function(RewardInputs(image, image, jnp.ones((64, 8, 8))))
    assert values.shape == (64,) and 0 <= values.min() < 0.1 and 0.9 < values.max() < 1


def test_another_interpreter_does_not_inherit_xla_flags(load_script, tmp_path, monkeypatch):
    against = load_script("benchmarks", "against_diffusers")
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_another_version=1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    own = against.child_environment(sys.executable)
    assert own["XLA_FLAGS"] == "--xla_of_another_version=1" and "JAX_COMPILATION_CACHE_DIR" not in own
    monkeypatch.chdir(Path(sys.executable).parent)
    assert against.is_this_python(f"./{Path(sys.executable).name}")
    # The python of an environment is a link to the same file, but it is another interpreter.
    venv.create(tmp_path / "other", symlinks=True)
    other = against.child_environment(str(tmp_path / "other" / "bin" / "python"))
    assert "XLA_FLAGS" not in other and other["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contenders": ("ra_jax", "theirs")}, "--contenders ra_jax theirs: expected some of ra_jax, diffusers"),
        ({"contenders": ("diffusers + PEFT",)}, "including ra_jax"),
        ({"geometries": ("tiny", "huge")}, "--geometries huge: expected some of tiny, small, wide, flux, flux_6"),
        ({"our_python": (sys.executable, "/no/python")}, "--our_python /no/python: no such program"),
    ],
)
def test_against_diffusers_refuses_names_that_it_does_not_know(load_script, changes, message):
    against = load_script("benchmarks", "against_diffusers")
    with pytest.raises(SystemExit, match=message.replace("+", r"\+")):
        against.check(against.Bench(**changes))


def test_contenders_know_the_names_and_sizes_that_against_diffusers_passes(load_script):
    against, contenders = (load_script("benchmarks", name) for name in ("against_diffusers", "contenders"))
    assert tuple(contenders.WORKERS) == (against.OURS, against.THEIRS, against.ONE_LORA) == against.CONTENDERS
    for sizes in (against.GEOMETRIES | against.LARGE).values():
        geometry = contenders.parse_geometry(json.dumps(sizes))
        assert {name: getattr(geometry, name) for name in sizes} == sizes


@pytest.mark.torch
def test_contenders_train_the_same_number_of_parameters(load_script):
    import torch

    contenders = load_script("benchmarks", "contenders")
    geometry = contenders.Geometry(2, 32, 1, 1, (2, 4), context=8, batch=1, joint_dim=32, pooled_dim=16, rank=4)
    _, theirs = contenders.make_their_model(geometry, "cpu", torch.float32)
    expected = sum(parameter.numel() for parameter in theirs)
    for experts, rank in ((3, 4), (1, 12)):
        step, arguments = contenders.make_our_step(geometry, experts, rank, "none")
        assert sum(x.size for x in jax.tree.leaves(arguments[0].trainable["flux"])) == expected
        state, metrics = jax.eval_shape(step, *arguments)
        assert metrics["base_loss"].shape == (1,)
        assert jax.tree.structure(state) == jax.tree.structure(arguments[0])
    assert contenders.count_our_flops(geometry, arguments[0].trainable["flux"]) > 0
