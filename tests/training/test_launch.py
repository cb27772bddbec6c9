"""Launches: the same steps on fake CPU devices, whatever the mesh, under pmap and over two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ra_jax.config import to_flat_dict

PROGRAM = Path(__file__).with_name("fake_devices.py")
STEPS = 5
LAUNCHES = {
    "one": {"one_device": True},
    "8x1": {},
    "2x4": {"mesh_fsdp": 4},
    "2x2x2": {"mesh_fsdp": 2, "mesh_tensor": 2},
    "pmap": {"parallelism": "pmap"},
}
KERNEL = "1/flux/transformer_blocks/attn/to_q/kernel"  # of the frozen base, [L, in, out]
MOMENT = "0/opt_state/"  # of the optimizer


def start(folder, config, launches, *, devices=8, steps=STEPS, process=None, restore=None) -> subprocess.Popen:
    job = {"devices": devices, "config": config, "steps": steps, "launches": launches, "folder": str(folder)}
    path = folder / f"job-{process[2] if process else 0}.json"
    path.write_text(json.dumps(job | {"process": process, "restore": restore or {}}))
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled")}
    return subprocess.Popen([sys.executable, PROGRAM, path], stdout=subprocess.PIPE, text=True, env=environment)


def finish(*programs) -> list[dict]:
    """What they print, once all have ended well."""
    outputs = [program.communicate(timeout=500)[0] for program in programs]
    assert [program.returncode for program in programs] == [0] * len(programs)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def compare(folder, name, reference) -> None:
    """Losses and every leaf within 1e-5, relative to the leaf's norm."""
    with np.load(folder / f"{name}.npz") as ours, np.load(reference) as theirs:
        assert set(ours) == set(theirs)
        np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-5)
        for leaf in theirs:
            if np.isnan(theirs[leaf]).all():  # not measured
                continue
            distance = np.linalg.norm(ours[leaf].astype(np.float64) - theirs[leaf])
            assert distance <= 1e-5 * np.linalg.norm(theirs[leaf]), (name, leaf)


@pytest.fixture(scope="module")
def human(config_in, tmp_path_factory):
    """(folder, where everything was, the configuration) of the human-scored steps by every launch."""
    folder = tmp_path_factory.mktemp("launches") / "human"
    folder.mkdir()
    config = to_flat_dict(config_in(folder, gradient_accumulation_steps=2, ema_decay=0.5, learning_rate=1e-3))
    return folder, finish(start(folder, config, LAUNCHES))[0], config


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAUNCHES if name != "one"])
def test_every_launch_takes_the_same_human_scored_steps(human, name):
    compare(human[0], name, human[0] / "one.npz")


@pytest.mark.slow
def test_weights_and_optimizer_are_divided_as_the_launch_says(human):
    places = human[1]
    moments = {leaf for leaf in places["2x4"] if leaf.startswith(MOMENT) and leaf.endswith("attn/to_q/lora_a")}
    assert len(moments) == 2
    expected = {
        "8x1": ("PartitionSpec(None, None, None)", "PartitionSpec(None, None, None)"),
        "2x4": ("PartitionSpec(None, 'fsdp', None)", "PartitionSpec(None, 'fsdp', None)"),
        "2x2x2": ("PartitionSpec(None, 'fsdp', 'tensor')", "PartitionSpec(None, 'fsdp', None)"),
        "pmap": ("PartitionSpec('replica',)", "PartitionSpec('replica',)"),
    }
    for name, (kernel, moment) in expected.items():
        assert places[name][KERNEL] == kernel
        assert {places[name][leaf] for leaf in moments} == {moment}


@pytest.mark.slow
def test_a_checkpoint_of_each_launch_restores_in_each_other(human):
    folder, _, config = human
    checkpoints = {name: str(folder / name / "checkpoints" / str(STEPS)) for name in LAUNCHES}
    into = {f"{name}-in-{other}": (name, other) for name in LAUNCHES for other in LAUNCHES if name != other}
    restore = {run: checkpoints[name] for run, (name, _) in into.items()}
    launches = {run: LAUNCHES[other] for run, (_, other) in into.items()}
    finish(start(folder, config, launches, restore=restore))
    for run, (name, _) in into.items():
        with np.load(folder / f"{run}.npz") as ours, np.load(folder / f"{name}.npz") as theirs:
            for leaf in set(theirs) - {"losses"}:
                np.testing.assert_array_equal(ours[leaf], theirs[leaf])


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one_device(human, tmp_path):
    _, _, config = human
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    launches = {"two": {"mesh_fsdp": 2}}
    programs = [start(tmp_path, config, launches, devices=2, process=[address, 2, number]) for number in range(2)]
    places = finish(*programs)
    assert places[0] == places[1] and places[0]["two"][KERNEL] == "PartitionSpec(None, 'fsdp', None)"
    compare(tmp_path, "two", human[0] / "one.npz")


@pytest.mark.slow
def test_every_launch_takes_the_same_steps_on_automatic_rewards(automatic, tmp_path):
    flags = {"train_batch_size": 8, "rollout_steps": 4, "policy_estimator": "sde", "sde_window": 1}
    config = to_flat_dict(automatic(**flags, decode_batch_size=1, learning_rate=1e-3))
    launches = {name: LAUNCHES[name] for name in ("one", "2x2x2", "pmap")}
    finish(start(tmp_path, config, launches, steps=2))
    for name in ("2x2x2", "pmap"):
        compare(tmp_path, name, tmp_path / "one.npz")
