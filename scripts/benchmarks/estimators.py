"""Compare the time and the memory of a human-scored step by the estimator of its policy.

    python scripts/benchmarks/estimators.py [--config configs/tiny.toml] [--rounds 40] [--train_batch_size 4]

Compiles the same step once for each estimator, runs the steps in turn, and prints the median time of each, how it
compares with `matching`, and the peak memory of the program. The data and the models of the configuration must
exist; `python -m ra_jax.demo` makes those of the default.
"""

import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from ra_jax.config.parse import from_flat_dict, load_toml
from ra_jax.parallel.compilation import program_memory
from ra_jax.training.setup import Setup, set_up
from ra_jax.training.step.train_step import make_train_step

ESTIMATORS = ("matching", "contrast", "nft")


@dataclass(frozen=True)
class Measurement:
    """Settings of the measurement."""

    config: Path = Path("configs/tiny.toml")  # configuration of a human-scored run
    demo: Path = Path("output/demo")  # the demo's folder, whose scenes and base are used
    rounds: int = 40  # steps of each estimator; the first is not counted
    train_batch_size: int = 4  # records in a step


def make_setup(measurement: Measurement, estimator: str, folder: str) -> Setup:
    """Set up the training with an estimator."""
    changes = {
        "train_json_path": str(measurement.demo / "data/train/labeled_dict.json"),
        "pretrained_model_name_or_path": str(measurement.demo / "tiny_flux_fill"),
        "pretrained_redux_model_name_or_path": str(measurement.demo / "tiny_redux"),
        "policy_estimator": estimator,
        "output_dir": folder,
        "overwrite_output_dir": True,
        "train_batch_size": measurement.train_batch_size,
        "report_to": ["none"],
        "validation_steps": 0,
        "val_json_path": None,
    }
    return set_up(from_flat_dict(load_toml(measurement.config) | changes))


class Stepper:
    """A compiled step and its state."""

    def __init__(self, setup: Setup):
        step = make_train_step(setup.objective, setup.optimizer, setup.step_settings)
        self._batches = setup.batches()
        self._state, self._frozen = setup.state, setup.frozen
        batch = next(self._batches)
        self._step = setup.partitioner.compile(step, self._state, self._frozen, batch)
        self.memory = program_memory(self._step)

    def run(self) -> float:
        """Run the step on the next batch, and return its seconds."""
        batch = next(self._batches)
        start = time.perf_counter()
        self._state, metrics = self._step(self._state, self._frozen, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start


def main(measurement: Measurement) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        steppers = {name: Stepper(make_setup(measurement, name, folder)) for name in ESTIMATORS}
        seconds = {name: [] for name in ESTIMATORS}
        for _ in range(measurement.rounds):
            for name, stepper in steppers.items():
                seconds[name].append(stepper.run())
    medians = {name: float(np.median(values[1:])) for name, values in seconds.items()}
    print(f"{platform.processor() or platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind}")
    print("| estimator | ms a step | relative to matching | peak memory in MB |\n| --- | --- | --- | --- |")
    for name, median in medians.items():
        ratio = median / medians["matching"]
        print(f"| {name} | {1e3 * median:.1f} | {ratio:.2f} | {steppers[name].memory / 1e6:.0f} |")


if __name__ == "__main__":
    main(tyro.cli(Measurement, description=__doc__, use_underscores=True))
