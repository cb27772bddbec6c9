"""Partitioners: the same steps on fake CPU devices with several meshes, under pmap and in two processes."""

import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from ra_jax.checkpoints import restore
from ra_jax.config.parse import from_flat_dict, to_flat_dict
from ra_jax.parallel.compilation import clear_jit_caches
from ra_jax.parallel.partitioning import named_leaves
from ra_jax.training.setup import set_up

PROGRAM = Path(__file__).with_name("fake_devices.py")
STEPS = 5
# Adam divides a gradient by its magnitude. With a tiny ε, gradients that consist of rounding errors would change the
# weights by full steps. The strength gives the policy a pull of 10. The default of this tiny data set gives hundreds,
# and the rounding of sums over a scene, in which better and worse results cancel, grows with it.
STEADY = {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "policy_strength": 0.25}
LAUNCHES = {
    "one": {"one_device": True},
    "8x1": {},
    "2x4": {"mesh_fsdp": 4},
    "2x2x2": {"mesh_fsdp": 2, "mesh_tensor": 2},
    "pmap": {"parallelism": "pmap"},
}
KERNEL = "1/flux/transformer_blocks/attn/to_q/kernel"  # in the frozen base, [L, in, out]
MOMENT = "0/opt_state/"  # in the optimizer state
PHOTOS = "2/source"  # in the batch, [A, B, h, w, 3]


def start(folder, config, launches, *, devices=8, steps=STEPS, process=None, checkpoints=None) -> subprocess.Popen:
    job = {"devices": devices, "config": config, "steps": steps, "launches": launches, "folder": str(folder)}
    path = folder / f"job-{process[2] if process else 0}.json"
    path.write_text(json.dumps(job | {"process": process, "checkpoints": checkpoints or {}}))
    return subprocess.Popen([sys.executable, PROGRAM, path], stdout=subprocess.PIPE, text=True)


def finish(*programs) -> list[dict]:
    """Wait for the programs, check that all succeed, and return the reports that they print."""
    outputs = [program.communicate(timeout=500)[0] for program in programs]
    assert [program.returncode for program in programs] == [0] * len(programs)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def compare(folder, name, reference) -> None:
    """Compare losses and leaves with the reference.

    Losses agree within 1e-5, leaves within 1e-5 of the leaf's norm. The limit is 3e-5 for the optimizer's mean of
    gradients, and twice that for its mean of squared gradients.
    """
    with np.load(folder / f"{name}.npz") as ours, np.load(reference) as theirs:
        assert set(ours) == set(theirs)
        np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-5)
        for leaf in theirs:
            np.testing.assert_array_equal(np.isnan(ours[leaf]), np.isnan(theirs[leaf]))  # not measured
            one, other = (np.nan_to_num(x[leaf].astype(np.float64)) for x in (ours, theirs))
            limit = (6e-5 if "/nu/" in leaf else 3e-5) if leaf.startswith("opt_state") else 1e-5
            assert np.linalg.norm(one - other) <= limit * np.linalg.norm(other), (name, leaf)


@dataclass(frozen=True)
class HumanSteps:
    """folder: has the states after the steps; report: printed by `fake_devices.py`; config: flat settings."""

    folder: Path
    report: dict
    config: dict


@pytest.fixture(scope="module")
def human(make_config_in, tmp_path_factory):
    """Human-scored steps by every partitioner, as `fake_devices.py` took them."""
    folder = tmp_path_factory.mktemp("launches")
    config = to_flat_dict(
        make_config_in(folder, gradient_accumulation_steps=2, ema_decay=0.5, target_modules=None, **STEADY)
    )
    return HumanSteps(folder, finish(start(folder, config, LAUNCHES))[0], config)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAUNCHES if name != "one"])
def test_all_partitioners_take_the_same_human_scored_steps(human, name):
    compare(human.folder, name, human.folder / "one.npz")


@pytest.mark.slow
def test_weights_optimizer_and_batch_are_sharded_by_the_partitioner(human):
    places = human.report["places"]
    moments = {leaf for leaf in places["2x4"] if leaf.startswith(MOMENT) and leaf.endswith("attn/to_q/lora_a")}
    assert len(moments) == 4  # two moments for each of the two kinds of blocks
    shared = [None, ["data", "fsdp"]]
    expected = {
        "8x1": ([], [], shared),
        "2x4": ([None, "fsdp"], [None, "fsdp"], shared),
        "2x2x2": ([None, "fsdp", "tensor"], [None, "fsdp"], shared),
        "pmap": (["replica"],) * 3,
    }
    for name, (kernel, moment, photos) in expected.items():
        assert places[name][KERNEL] == kernel
        assert [places[name][leaf] for leaf in moments] == [moment] * 4
        assert places[name][PHOTOS] == photos
    # Previews and drift use the weights on a mesh, or those of one replica.
    assert human.report["local"] == {"one": 1, "8x1": 8, "2x4": 8, "2x2x2": 8, "pmap": 1}


@pytest.mark.slow
def test_there_is_no_loop_over_heads_on_a_mesh(human):
    alone = {"one": "by_head", "pmap": "by_head"}
    assert human.report["attention"] == dict.fromkeys(LAUNCHES, "xla") | alone


@pytest.mark.slow
def test_blocks_are_gathered_only_if_weights_are_sharded(human):
    gathered = human.report["gathered"]
    assert gathered["one"] == gathered["8x1"] == gathered["pmap"] == [0, 0]
    for name in ("2x4", "2x2x2"):
        divided, whole = gathered[name]
        assert divided == whole > 10


@pytest.mark.slow
def test_a_checkpoint_of_each_partitioner_restores_in_all_others(human):
    restored = human.report["restored"]
    assert len(restored) == len(LAUNCHES) * (len(LAUNCHES) - 1)
    assert not any(restored.values()), restored


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one_device(human, tmp_path):
    folder, config = human.folder, human.config
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    others = {name: str(folder / name) for name in ("one", "2x2x2", "pmap")}
    programs = [
        start(tmp_path, config, {"two": {"mesh_fsdp": 2}}, devices=2, process=[address, 2, i], checkpoints=others)
        for i in range(2)
    ]
    reports = finish(*programs)
    assert reports[0] == reports[1]
    assert reports[0]["places"]["two"][KERNEL] == [None, "fsdp"]
    assert reports[0]["restored"] == {f"{name} in two": [] for name in others}
    compare(tmp_path, "two", folder / "one.npz")
    # One process can restore the checkpoint that the two processes saved together.
    setup = set_up(from_flat_dict(config | {"output_dir": str(tmp_path / "again")}))
    restored = restore(tmp_path / "two/checkpoints" / str(STEPS), setup.state)
    with np.load(tmp_path / "two.npz") as saved:
        for leaf, x in named_leaves(restored).items():
            np.testing.assert_array_equal(x, saved[leaf])


@pytest.mark.slow
def test_all_partitioners_take_the_same_steps_on_automatic_rewards(make_automatic_config, photo_flags, tmp_path):
    flags = {"train_batch_size": 8, "rollout_steps": 2, "num_generations": 2, "decode_batch_size": 1}
    config = to_flat_dict(make_automatic_config(**flags, **photo_flags, **STEADY))
    launches = {name: LAUNCHES[name] for name in ("one", "2x4", "pmap")}
    finish(start(tmp_path, config, launches, steps=2))
    for name in ("2x4", "pmap"):
        compare(tmp_path, name, tmp_path / "one.npz")


def test_replicas_on_one_device_have_the_same_base(make_config):
    """On one device the base has one array per block. Replicas have the same, with a leading replica axis."""
    mesh, replicas = (
        set_up(make_config(parallelism=parallelism, overwrite_output_dir=True)) for parallelism in ("mesh", "pmap")
    )
    jax.tree.map(np.testing.assert_array_equal, replicas.partitioner.unshard(replicas.frozen), mesh.frozen)
    leaves = jax.tree.leaves(mesh.frozen["flux"], is_leaf=lambda x: isinstance(x, tuple))
    assert any(isinstance(leaf, tuple) for leaf in leaves)


def test_caches_are_cleared_on_the_cpu_only():
    traced = []
    double = jax.jit(lambda x: traced.append(x) or 2 * x)
    double(1.0)
    clear_jit_caches("tpu")
    double(1.0)
    assert len(traced) == 1
    clear_jit_caches("cpu")
    double(1.0)
    assert len(traced) == 2
