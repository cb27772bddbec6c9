"""Compile FLUX.1-Fill's training step for TPU pods, without a TPU, to see whether it fits and how it scales.

    python scripts/benchmarks/tpu_tables.py modes [--root output/tpu]   three modes on three topologies
    python scripts/benchmarks/tpu_tables.py scale [--root output/tpu]   8 to 256 chips, weights sharded over 8

Blocks are recomputed in the backward pass (--gradient_checkpointing full). Automatic GRPO on v5e, the smallest chip,
uses --gradient_checkpointing points, which also processes the timesteps of the policy loss one after another. Without
it the step needs 16.3 GB there, and the chip has 16 GB.

A separate process of `python -m ra_jax.aot` compiles each row, so that its peak of host memory can be measured. The
result is stored in --root. A row with a stored result is not compiled again. After a change of the code give another
--root.
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
# Topology -> number of chips.
TOPOLOGIES = {"v5e:4x4": 16, "v5p:2x2x1": 4, "v6e:2x4": 8}
SCALES = {"v5e:2x4": 8, "v5e:4x4": 16, "v5e:4x8": 32, "v5e:8x8": 64, "v5e:8x16": 128, "v5e:16x16": 256}


@dataclass(frozen=True)
class Tables:
    """Settings of both tables."""

    root: Path = Path("output/tpu")  # folder of the stored results
    records: int = 1  # records per chip in a batch
    mode: str = "standard"  # mode of `scale`: standard, human or automatic


def read_figures(tables: Tables, mode: str, topology: str, chips: int, fsdp: int) -> dict:
    """Read the figures of one compiled step from its file; compile the step first if the file does not exist.

    Args:
        tables: settings.
        mode: standard, human or automatic.
        topology: such as v5e:4x4.
        chips: number of chips of the topology.
        fsdp: number of chips that the weights are sharded over.

    Raises:
        SystemExit: the compilation failed.
    """
    path = tables.root / f"{mode}-{topology.replace(':', '-')}-{fsdp}-{tables.records}.json"
    if not path.exists():
        tables.root.mkdir(parents=True, exist_ok=True)
        flags = {"topology": topology, "config": CONFIGS[mode], "json": path, "mesh_fsdp": fsdp}
        flags |= {"aspect_ratio_buckets": "512,512", "train_batch_size": chips * tables.records}
        remat = "points" if mode == "automatic" and topology.startswith("v5e") else "full"
        flags |= {"gradient_accumulation_steps": 1, "gradient_checkpointing": remat, "num_generations": 8}
        command = [sys.executable, "-m", "ra_jax.aot", *(f"--{name}={value}" for name, value in flags.items())]
        process = subprocess.run(command, check=False, capture_output=True, text=True)
        if not path.exists():
            sys.exit(f"{' '.join(map(str, command))} wrote no {path}\n{process.stdout}\n{process.stderr}")
    return json.loads(path.read_text())


HEADS = "arguments [GB] | temporaries [GB] | total | TFLOP | sent by a chip [GB] | roofline [s] | MFU at most"


def format_row(figures: dict) -> str:
    """Format the figures of a step as the columns of `HEADS`."""
    if "refusal" in figures:
        return "does not fit, refused by the compiler | | | | | |"
    giga = {name: figures[f"{name}_bytes"] / 1e9 for name in ("argument", "temporary", "total", "chip")}
    sent = sum(figures["collective_bytes"].values()) / 1e9
    return (
        f"{giga['argument']:.2f} | {giga['temporary']:.2f} | {giga['total']:.1f} of {giga['chip']:.0f}"
        f"{'' if figures['fits'] else ' (does not fit)'} | {figures['flops'] / 1e12:.0f} | {sent:.1f} | "
        f"{figures['seconds']:.2f} | {figures['mfu_bound']:.0%}"
    )


def modes(tables: Tables) -> None:
    """Print a table of each mode on each topology, with the weights sharded over all chips."""
    heads = f"| step | topology | batch | {HEADS} | compile [s] | host [GB] |"
    print(heads + "\n" + "| --- " * (heads.count("|") - 1) + "|")
    for mode in CONFIGS:
        for topology, chips in TOPOLOGIES.items():
            figures = read_figures(tables, mode, topology, chips, fsdp=chips)
            costs = " | "
            if "refusal" not in figures:
                costs = f"{figures['compile_seconds']:.0f} | {figures['host_peak_bytes'] / 1e9:.1f}"
            batch, columns = figures["train_batch_size"], format_row(figures)
            print(f"| {mode} | {topology} | {batch} | {columns} | {costs} |", flush=True)


def scale(tables: Tables) -> None:
    """Print a table of one mode on 8 to 256 chips; fsdp stays 8, the data axis grows, records per chip are fixed."""
    heads = f"| topology | chips | {HEADS} |"
    print(f"{tables.mode} step, {tables.records} record(s) per chip, fsdp 8\n\n{heads}")
    print("| --- " * (heads.count("|") - 1) + "|")
    for topology, chips in SCALES.items():
        figures = read_figures(tables, tables.mode, topology, chips, fsdp=8)
        print(f"| {topology} | {chips} | {format_row(figures)} |", flush=True)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"modes": modes, "scale": scale}, use_underscores=True, config=(tyro.conf.OmitArgPrefixes,)
    )
