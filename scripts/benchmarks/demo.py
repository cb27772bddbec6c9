"""Measure time and memory of the demo ("Time of the demo" and "The policy ratio" in docs/results.md).

    python scripts/benchmarks/demo.py [--root output/measured]

Makes the demo's scenes and base, trains with configs/tiny.toml, and removes objects from the held-out scenes. All
commands run on the CPU. It prints the seconds of each command, the seconds from the start of the training to its first
row of metrics, the largest peak memory of the three processes, the mean ratio, and clip_fraction in the last step
before each sync of the old policy.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from ra_jax.config.parse import load_toml
from ra_jax.reporting.trackers import METRICS_FILE, read_rows


@dataclass(frozen=True)
class Measurement:
    """Settings of the measurement."""

    root: Path = Path("output/measured")  # folder of all that the demo makes; it is deleted first
    config: Path = Path("configs/tiny.toml")  # configuration of the training; its paths are replaced


def run_timed(module: str, *arguments: str, watched: Path | None = None) -> tuple[float, float, float | None]:
    """Run `python -m module` on the CPU.

    Returns:
        seconds, peak memory in GB, and seconds until the file `watched` was not empty (None without such a file).

    Raises:
        SystemExit: the command failed.
    """
    start, seconds_to_file = time.monotonic(), None
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if seconds_to_file is None and watched is not None and watched.exists() and watched.stat().st_size:
            seconds_to_file = time.monotonic() - start
        if pid:
            break
        time.sleep(0.1)
    if status:
        sys.exit(f"{' '.join(command)} failed with exit status {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - start, usage.ru_maxrss * 1024 / 1e9, seconds_to_file


def main(measurement: Measurement) -> None:
    """Run and measure the three commands, and print the figures."""
    root, run = measurement.root, measurement.root / "run"
    shutil.rmtree(root, ignore_errors=True)
    prepare_seconds, prepare_memory, _ = run_timed("ra_jax.demo", "--output_dir", str(root))
    held_out = str(root / "data" / "held_out" / "triplets.json")
    paths = {
        "train_json_path": root / "data" / "train" / Path(load_toml(measurement.config)["train_json_path"]).name,
        "val_json_path": held_out,
        "pretrained_model_name_or_path": root / "tiny_flux_fill",
        "pretrained_redux_model_name_or_path": root / "tiny_redux",
        "output_dir": run,
    }
    flags = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    train_seconds, train_memory, seconds_to_row = run_timed(
        "ra_jax.train", "--config", str(measurement.config), *flags, watched=run / METRICS_FILE
    )
    removal = ("--source_image", held_out, "--experts", str(run), "--output_dir", str(root / "removals"))
    remove_seconds, remove_memory, _ = run_timed("ra_jax.infer", *removal, "--num_inference_steps", "12")

    rows = read_rows(run / METRICS_FILE)
    sync_steps = load_toml(measurement.config)["policy_sync_steps"]
    clip = [row["clip_fraction_at_sync"] for row in rows if row["step"] % sync_steps == 0]
    total = prepare_seconds + train_seconds + remove_seconds
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs")
    print(f"prepare {prepare_seconds:.0f} s, train {train_seconds:.0f} s, remove {remove_seconds:.0f} s")
    print(f"together {total:.0f} s")
    print(f"first metric {seconds_to_row:.0f} s after the start of the training")
    print(f"peak memory {max(prepare_memory, train_memory, remove_memory):.2f} GB")
    print(f"mean_ratio {np.mean([row['mean_ratio'] for row in rows[1:]]):.3f}, steps {rows[-1]['step']}")
    print(f"clip_fraction before a sync: mean {np.mean(clip):.3f} ({np.round(clip, 2).tolist()})")


if __name__ == "__main__":
    main(tyro.cli(Measurement, description=__doc__, use_underscores=True))
