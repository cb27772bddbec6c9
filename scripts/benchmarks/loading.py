"""Measure the host memory for loading a model, by one process and by several that shard its weights.

    python scripts/benchmarks/loading.py [--processes 1 2 4]

Writes a transformer of random weights to a temporary folder. N processes load it at once, for each N in --processes.
Each process has one CPU device, and the fsdp axis of the mesh has all N devices. It prints the peak memory of a process
above its memory before loading, also as a fraction of the weights, and the memory that remains in use after loading.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

HEADS, DOUBLE, SINGLE = 8, 4, 8  # attention heads, double blocks, single blocks


@dataclass(frozen=True)
class Measurement:
    """Settings of the measurement."""

    processes: tuple[int, ...] = (1, 2, 4)  # numbers of processes, measured one after another
    hidden: int = 1024  # width of the transformer, a multiple of 1024


def write_model(folder: Path, hidden: int) -> int:
    """Write a FLUX-Fill model of random float32 weights; return the bytes of its transformer."""
    import jax
    from flax import nnx

    from ra_jax.interop.diffusers import save_fill_pipeline_config, save_flux, save_vae
    from ra_jax.models.flux import Flux, FluxConfig
    from ra_jax.models.vae import AutoencoderKL, VAEConfig

    rngs = nnx.Rngs(0)
    sizes = {"num_layers": DOUBLE, "num_single_layers": SINGLE, "num_attention_heads": HEADS}
    head_dim = hidden // HEADS
    axes = (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)
    config = FluxConfig(
        in_channels=8 * 16 + 4 * 64, out_channels=64, attention_head_dim=head_dim, axes_dims_rope=axes, **sizes
    )
    flux = Flux(config, rngs=rngs)
    save_flux(flux, folder)
    save_vae(
        AutoencoderKL(VAEConfig(block_out_channels=(8,) * 4, latent_channels=16, norm_num_groups=4), rngs=rngs), folder
    )
    save_fill_pipeline_config(folder)
    return sum(x.nbytes for x in jax.tree.leaves(nnx.state(flux)))


def load(folder: str, address: str, count: int, number: int) -> None:
    """Run one loading process: load this process's shard and print its memory as JSON.

    Args:
        folder: the model.
        address: coordinator of the processes, HOST:PORT.
        count: number of processes.
        number: number of this process, from 0.
    """
    import jax

    if count > 1:
        jax.distributed.initialize(address, count, number)
    from ra_jax.interop.diffusers import load_fill_model
    from ra_jax.models.options import ModelOptions
    from ra_jax.parallel.mesh import make_mesh
    from ra_jax.parallel.partitioner import MeshPartitioner

    partitioner = MeshPartitioner(make_mesh(fsdp=count))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read_memory("VmRSS")
    loaded = load_fill_model(folder, None, ModelOptions("float32", 512), placement=partitioner.placement)
    jax.block_until_ready(loaded.frozen)
    memory = {"peak": read_memory("VmHWM") - before, "after": read_memory("VmRSS") - before}
    print(json.dumps(memory), flush=True)
    if count > 1:
        jax.distributed.shutdown()


def read_memory(name: str) -> int:
    """Read a field of /proc/self/status in bytes: VmRSS (memory of this process) or VmHWM (its peak)."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def main(measurement: Measurement) -> None:
    """Load the model with each number of processes, and print a row for each."""
    with tempfile.TemporaryDirectory() as folder:
        total = write_model(Path(folder), measurement.hidden)
        print(f"transformer: {total / 1e9:.2f} GB in float32\n")
        print("| processes | peak of a process | of the weights | after loading |\n| --- | --- | --- | --- |")
        for count in measurement.processes:
            with socket.socket() as free_port:
                free_port.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free_port.getsockname()[1]}"
            processes = [
                subprocess.Popen(
                    [sys.executable, __file__, "load", folder, address, str(count), str(number)],
                    stdout=subprocess.PIPE,
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    text=True,
                )
                for number in range(count)
            ]
            memories = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
            peak, after = (max(memory[name] for memory in memories) for name in ("peak", "after"))
            print(f"| {count} | {peak / 1e9:.2f} GB | {peak / total:.2f} | {after / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["load"]:
        load(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main(tyro.cli(Measurement, description=__doc__, use_underscores=True))
