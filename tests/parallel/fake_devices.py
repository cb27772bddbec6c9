"""A program that tests start: takes the first steps of a run on fake CPU devices, with one partitioner after another.

    python fake_devices.py JOB.json

JOB.json has the keys

    devices      number of devices of this process
    config       flat settings
    steps        number of steps
    launches     {name: flags}, where the flags select a partitioner
    folder       output folder, for `<name>.npz` (losses [steps], and every leaf of the state after the steps) and for
                 the checkpoint `<name>/checkpoints/<steps>`
    process      [address, number of processes, number of this process], or null for a single process
    checkpoints  {name: folder} with checkpoints of other programs

Every partitioner then restores the checkpoints of all others and those of other programs. The program prints a line of
JSON, in which `name` is a key of `launches`:

    places     {name: {leaf: axes that shard each dimension}} for the leaves of state, base and batch
    restored   {"other name in name": leaves whose restored values or shardings are wrong}
    local      {name: number of devices that hold the state of `Partitioner.addressable`}
    attention  {name: attention implementation}
    gathered   {name: [number of stacked parameters that are sharded over fsdp alone, number of those of which one whole
               block is gathered]}, from the shapes of the all-gathers in the compiled step
"""

import json
import os
import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text())
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={job['devices']}"

import jax  # noqa: E402 (the flags come first)
import numpy as np  # noqa: E402

if jax.__version_info__ < (0, 11):
    # Most of the time here is compilation. JAX 0.12 keeps the optimizations of a run: without LLVM's optimizations,
    # replicas differed from one device by 1.2e-5 there, and with them by 5e-6.
    jax.config.update("jax_disable_most_optimizations", True)
if job["process"]:
    address, count, number = job["process"]
    jax.distributed.initialize(address, count, number)

from ra_jax.checkpoints import Checkpoints, restore  # noqa: E402
from ra_jax.config.parse import from_flat_dict  # noqa: E402
from ra_jax.interop import diffusers as weights_of  # noqa: E402
from ra_jax.models import blocks as block_loop  # noqa: E402
from ra_jax.parallel.mesh import make_mesh  # noqa: E402
from ra_jax.parallel.partitioner import MeshPartitioner, fetch, scalars  # noqa: E402
from ra_jax.parallel.partitioning import STACKED, named_leaves  # noqa: E402
from ra_jax.training import setup as setting_up  # noqa: E402
from ra_jax.training.step.train_step import make_train_step  # noqa: E402

block_loop.MAX_UNROLLED_BLOCKS = 0  # loops over blocks, as in the full model; this also compiles faster
folder, make_partitioner = Path(job["folder"]), setting_up.make_partitioner
implementation_for, chosen = weights_of.implementation_for, []


def noted_implementation(*args, **kwargs) -> str:
    chosen.append(implementation_for(*args, **kwargs))
    return chosen[-1]


weights_of.implementation_for = noted_implementation


def values_of(tree) -> dict[str, np.ndarray]:
    return {leaf: fetch(x) for leaf, x in named_leaves(tree).items()}


def spec_of(x: jax.Array) -> list:
    """Return the axes that shard each dimension, without trailing None."""
    spec = [list(axes) if isinstance(axes, tuple) else axes for axes in x.sharding.spec]
    while spec and spec[-1] is None:
        spec.pop()
    return spec


def run(name: str, flags: dict):
    """Take the steps and write the files; return one copy of the state, `places`, `local` and `gathered`."""
    config = from_flat_dict(job["config"] | {"output_dir": str(folder / name)} | flags)
    setup = setting_up.set_up(config)
    state, partitioner, losses, program = setup.state, setup.partitioner, [], None
    for batch in islice(setup.batches(), job["steps"]):
        if program is None:
            settings = replace(setup.step_settings, drift_interval=0)  # a smaller program
            step = make_train_step(setup.objective, setup.optimizer, settings)
            program = partitioner.compile(step, state, setup.frozen, batch)
        state, metrics = program(state, setup.frozen, batch)
        losses.append(float(scalars(metrics)["train_loss"]))
    places = {leaf: spec_of(x) for leaf, x in named_leaves((state, setup.frozen, batch)).items()}
    whole = partitioner.unshard(state)
    checkpoints = Checkpoints(config.run.output_dir)
    checkpoints.save(job["steps"], whole, position=job["steps"], config={}, base=setup.loaded.fingerprint)
    checkpoints.close()
    values = values_of(whole)
    if jax.process_index() == 0:
        np.savez(folder / f"{name}.npz", losses=losses, **values)
    local = len(jax.tree.leaves(partitioner.addressable(state))[0].devices())
    return whole, places, local, gathered_blocks((state.trainable, setup.frozen), program.as_text())


def gathered_blocks(weights, hlo: str) -> list[int]:
    """Count the parameters that are sharded over fsdp alone, and those of which an all-gather returns one block."""
    results = {shape.removeprefix("1,") for shape in re.findall(r"= f32\[([0-9,]*)\][^ ]* all-gather\(", hlo)}
    blocks = [
        ",".join(map(str, x.shape[1:]))
        for leaf, x in named_leaves(weights).items()
        if re.search(STACKED, leaf) and "fsdp" in spec_of(x) and "tensor" not in spec_of(x)
    ]
    return [len(blocks), sum(block in results for block in blocks)]


def differences(checkpoint: Path, like, expected: dict[str, np.ndarray]) -> list[str]:
    """Return the leaves whose restored values differ from `expected`, or their shardings from those of `like`."""
    restored = restore(checkpoint, like)
    places = {leaf: x.sharding for leaf, x in named_leaves(like).items()}
    values = values_of(restored)
    moved = [
        leaf for leaf, x in named_leaves(restored).items() if not x.sharding.is_equivalent_to(places[leaf], x.ndim)
    ]
    return moved + [leaf for leaf in values if not np.array_equal(values[leaf], expected[leaf], equal_nan=True)]


states, places, local, gathered, attention = {}, {}, {}, {}, {}
for name, flags in job["launches"].items():
    if flags.pop("one_device", False):
        setting_up.make_partitioner = lambda config: MeshPartitioner(make_mesh(devices=jax.devices()[:1]))
    states[name], places[name], local[name], gathered[name] = run(name, flags)
    setting_up.make_partitioner = make_partitioner
    attention[name] = chosen[-1]
folders = {name: folder / name for name in states} | {name: Path(at) for name, at in job["checkpoints"].items()}
restored = {}
for partitioner, state in states.items():
    for name, at in folders.items():
        if name != partitioner:
            with np.load(at.with_suffix(".npz")) as saved:
                checkpoint = at / "checkpoints" / str(job["steps"])
                restored[f"{name} in {partitioner}"] = differences(checkpoint, state, saved)
report = {"places": places, "restored": restored, "local": local, "attention": attention, "gathered": gathered}
print(json.dumps(report))
