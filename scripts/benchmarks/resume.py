"""Check that a run that was killed and resumed equals an uninterrupted run.

    python scripts/benchmarks/resume.py [--config configs/tiny.toml] [--steps 30]

Trains --steps steps without interruption. Then trains again, kills the run (SIGKILL) a few steps after its checkpoint
at half of the steps, and resumes it. The arrays of the final states must be equal bit for bit. All metrics must be
equal except times and rates. Exit status 1: they differ.
"""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tyro

from ra_jax.checkpoints import find_checkpoint
from ra_jax.reporting.trackers import METRICS_FILE, read_rows

CLOCK = ("step_time", "data_wait", "images_per_second", "tflops_per_second_per_device")


@dataclass(frozen=True)
class Check:
    """Settings of the check."""

    config: Path = Path("configs/tiny.toml")  # configuration of both runs
    root: Path = Path("output/resume")  # folder of both runs
    steps: int = 30  # training steps of each run; a checkpoint is written at half of them

    def command(self, name: str, *more: str) -> list[str]:
        """Return the training command of a run. `name` is its folder in `root`; `more` are further flags."""
        flags = (
            f"--max_train_steps {self.steps} --checkpointing_steps {self.steps // 2} --validation_steps 0 --log_freq 1"
        )
        output = ("--output_dir", str(self.root / name))
        return [sys.executable, "-m", "ra_jax.train", "--config", str(self.config), *flags.split(), *output, *more]


def main(check: Check) -> None:
    """Run both, compare them, and exit with status 1 if they differ."""
    subprocess.run(check.command("straight", "--overwrite_output_dir"), check=True)
    killed = subprocess.Popen(check.command("killed", "--overwrite_output_dir"))
    run, half = check.root / "killed", check.steps // 2
    while not ((run / "checkpoints" / str(half)).exists() and len(read_rows(run / METRICS_FILE)) >= half + 3):
        if killed.poll() is not None:
            sys.exit(f"{run}: the run ended before it could be killed; give more --steps")
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    if (newest := find_checkpoint(run).name) != str(half):
        sys.exit(f"{run}: killed too late; the newest checkpoint is {newest}, expected {half}; give more --steps")
    print(f"killed after step {read_rows(run / METRICS_FILE)[-1]['step']}, checkpoint {half}", flush=True)
    subprocess.run(check.command("killed", "--resume_from_checkpoint", "latest"), check=True)

    states = []
    for name in ("straight", "killed"):
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            states.append(reader.restore(find_checkpoint(check.root / name) / "state"))
    straight, resumed = states
    differing = [name for name in straight if not np.array_equal(straight[name], resumed[name])]
    rows = [
        [{k: v for k, v in row.items() if k not in CLOCK} for row in read_rows(check.root / name / METRICS_FILE)]
        for name in ("straight", "killed")
    ]
    print(f"arrays of the state that differ: {len(differing)} of {len(straight)} {differing[:5]}")
    print(f"metric rows equal: {rows[0] == rows[1]} ({len(rows[0])} and {len(rows[1])})")
    sys.exit(bool(differing) or rows[0] != rows[1])


if __name__ == "__main__":
    main(tyro.cli(Check, description=__doc__, use_underscores=True))
