"""Does a step at FLUX.1-Fill's full size fit TPU pods, and does it scale? By compilation, without a TPU.

    python scripts/benchmarks/tpu_tables.py modes [--root output/tpu]   three modes on three topologies
    python scripts/benchmarks/tpu_tables.py scale [--root output/tpu]   8 to 256 chips, weights over 8

Blocks are recomputed (--gradient_checkpointing full), and of automatic GRPO on the smallest chip the points of a
log-probability one by one (points): else it takes 16.3 of 16 GB there.

Every cell is a `python -m ra_jax.aot` of its own, so that its peak of host memory is its own. One that is there is not
compiled again: after a change of the program give another root.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

CONFIGS = {
    "standard": "configs/flux_fill_standard.toml",
    "human": "configs/flux_fill_human.toml",
    "automatic": "configs/flux_fill_auto.toml",
}
TOPOLOGIES = {"v5e:4x4": 16, "v5p:2x2x1": 4, "v6e:2x4": 8}
SCALES = {"v5e:2x4": 8, "v5e:4x4": 16, "v5e:4x8": 32, "v5e:8x8": 64, "v5e:8x16": 128, "v5e:16x16": 256}


@dataclass(frozen=True)
class Tables:
    """root: where cells go; records: of a chip; mode: of `scale`."""

    root: Path = Path("output/tpu")
    records: int = 1
    mode: str = "standard"


def cell(tables: Tables, mode: str, topology: str, chips: int, fsdp: int) -> dict:
    """Figures of one compiled step, from its file or by compiling it now; ends the program where that fails."""
    path = tables.root / f"{mode}-{topology.replace(':', '-')}-{fsdp}-{tables.records}.json"
    if not path.exists():
        tables.root.mkdir(parents=True, exist_ok=True)
        flags = {"topology": topology, "config": CONFIGS[mode], "json": path, "mesh_fsdp": fsdp}
        flags |= {"aspect_ratio_buckets": "512,512", "train_batch_size": chips * tables.records}
        remat = "points" if mode == "automatic" and topology.startswith("v5e") else "full"
        flags |= {"gradient_accumulation_steps": 1, "gradient_checkpointing": remat, "num_generations": 8}
        command = [sys.executable, "-m", "ra_jax.aot", *(f"--{name}={value}" for name, value in flags.items())]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if not path.exists():
            sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return json.loads(path.read_text())


HEADS = "arguments [GB] | temporaries [GB] | total | TFLOP | sent by a chip [GB] | roofline [s] | MFU at most"


def row(found: dict) -> str:
    """A cell's columns of `HEADS`."""
    if "refusal" in found:
        return "the compiler found no place for it | | | | | |"
    giga = {name: found[f"{name}_bytes"] / 1e9 for name in ("argument", "temporary", "total", "chip")}
    sent = sum(found["collective_bytes"].values()) / 1e9
    return (
        f"{giga['argument']:.2f} | {giga['temporary']:.2f} | {giga['total']:.1f} of {giga['chip']:.0f}"
        f"{'' if found['fits'] else ' (does not fit)'} | {found['flops'] / 1e12:.0f} | {sent:.1f} | "
        f"{found['seconds']:.2f} | {found['mfu_bound']:.0%}"
    )


def modes(tables: Tables) -> None:
    """Each mode on each topology, weights over all chips."""
    heads = f"| step | topology | batch | {HEADS} | compile [s] | host [GB] |"
    print(heads + "\n" + "| --- " * (heads.count("|") - 1) + "|")
    for mode in CONFIGS:
        for topology, chips in TOPOLOGIES.items():
            found = cell(tables, mode, topology, chips, fsdp=chips)
            took = " | "
            if "refusal" not in found:
                took = f"{found['compile_seconds']:.0f} | {found['host_peak_bytes'] / 1e9:.1f}"
            print(f"| {mode} | {topology} | {found['train_batch_size']} | {row(found)} | {took} |", flush=True)


def scale(tables: Tables) -> None:
    """One mode on more and more chips: fsdp 8, data growing, the batch of a chip fixed."""
    heads = f"| topology | chips | {HEADS} |"
    print(f"{tables.mode} step, {tables.records} record(s) a chip, fsdp 8\n\n{heads}")
    print("| --- " * (heads.count("|") - 1) + "|")
    for topology, chips in SCALES.items():
        print(f"| {topology} | {chips} | {row(cell(tables, tables.mode, topology, chips, fsdp=8))} |", flush=True)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"modes": modes, "scale": scale}, use_underscores=True, config=(tyro.conf.OmitArgPrefixes,)
    )
