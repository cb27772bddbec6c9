"""A program that tests start: the first steps of a run on fake CPU devices, launched in one way after another.

    python fake_devices.py JOB.json

JOB: {"devices": of this process, "config": flat settings, "steps": n, "launches": {name: flags}, "folder": where
`<name>.npz` (losses [steps], every leaf of the state after them) and the checkpoint `<name>/checkpoints/<steps>` go,
"process": [address, processes, this one's number] or null}. "restore": {name: checkpoint of another launch} begins
there and takes no step. Prints a JSON line: {name: {leaf: how its dimensions are divided}}.
"""

import json
import os
import sys
from itertools import islice
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text())
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={job['devices']}"

import jax  # noqa: E402 (the flags come first)
import numpy as np  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time here
if job["process"]:
    address, count, number = job["process"]
    jax.distributed.initialize(address, count, number)

from ra_jax.config import from_flat_dict  # noqa: E402
from ra_jax.training import setup as setting_up  # noqa: E402
from ra_jax.training.checkpoints import Checkpoints, named_leaves, restore  # noqa: E402
from ra_jax.training.launch import MeshLaunch, fetch  # noqa: E402
from ra_jax.training.mesh import make_mesh  # noqa: E402


def run(name: str, flags: dict) -> dict[str, str]:
    make_launch = setting_up.make_launch
    if flags.pop("one_device", False):
        setting_up.make_launch = lambda config: MeshLaunch(make_mesh(devices=jax.devices()[:1]))
    config = from_flat_dict(job["config"] | {"output_dir": str(Path(job["folder"]) / name)} | flags)
    setup = setting_up.set_up(config)
    setting_up.make_launch = make_launch
    state, losses = setup.state, []
    if name in job["restore"]:
        state = restore(Path(job["restore"][name]), setup.launch.whole(state))
    else:
        step = setup.step_programs()
        for number, batch in enumerate(islice(setup.batches(), job["steps"])):
            state, metrics = step(state, setup.frozen, batch, number)
            losses.append(float(metrics["train_loss"]))
    places = {leaf: str(x.sharding.spec) for leaf, x in named_leaves((state, setup.frozen)).items()}
    whole = setup.launch.whole(state) if name not in job["restore"] else state
    values = {leaf: fetch(x) for leaf, x in named_leaves(whole).items()}
    if name not in job["restore"]:
        checkpoints = Checkpoints(config.run.output_dir)
        checkpoints.save(job["steps"], whole, position=job["steps"], config={}, base=setup.loaded.fingerprint)
        checkpoints.close()
    if jax.process_index() == 0:
        np.savez(Path(job["folder"]) / f"{name}.npz", losses=losses, **values)
    return places


print(json.dumps({name: run(name, flags) for name, flags in job["launches"].items()}))
