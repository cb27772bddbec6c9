"""Compiles the train step for a TPU topology without TPU hardware, and prints its memory use and its roofline.

    python -m ra_jax.aot --topology v5e:4x4 --config FILE.toml

The table shows the memory that the step needs per chip, the bytes that a chip sends to other chips, and a lower bound
of the step time. Nothing runs, and no weights are read. All flags of `python -m ra_jax.train` are accepted, but the
data and the output folder that they name are not read.

If the step does not fit the memory of a chip, the command compiles smaller configurations, prints the first one that
fits, and exits with status 1.
"""

import argparse
import json
import logging
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from ra_jax.config.parse import config_file, parse, to_flat_dict
from ra_jax.config.settings import TrainConfig
from ra_jax.errors import OutputError, UserError
from ra_jax.outputs import Outputs, check_outputs, write_file

DESCRIPTION = (
    "Compiles the train step of a configuration for a TPU that is not there, and tells what it needs of a chip. All "
    "flags of python -m ra_jax.train may follow."
)
# By --effort: `jax_exec_time_optimization_effort`, the option of JAX up to 0.11.0.
EFFORTS = {"quick": -1.0, "full": 0.0}
# By --effort: `jax_optimization_level`, the option of JAX from 0.11.1 on; UNKNOWN is its default.
LEVELS = {"quick": "O1", "full": "UNKNOWN"}
PLACES = ("--train_json_path", "--val_json_path", "--output_dir")  # required by training, not read here
UNUSED = "unused"  # value of these flags if the user does not give them


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, compile and print. Exit with status 1 if the step does not fit or on a `UserError`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    parser = argparse.ArgumentParser(prog="python -m ra_jax.aot", description=DESCRIPTION)
    parser.add_argument("--topology", required=True, help="chips and their grid, such as v5e:4x4, v5p:2x2x1, v6e:2x4")
    parser.add_argument(
        "--effort",
        choices=EFFORTS,
        default="quick",
        help="quick: the compiler does not look for the fastest program, in a fifth of the time; full: as in training",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here, as JSON")
    own, rest = parser.parse_known_args(argv)
    unset = [place for place in PLACES if not any(token.startswith(place) for token in rest)]
    try:
        config = parse([*(token for place in unset for token in (place, UNUSED)), *rest])
        if own.json:
            check_json(own.json, config, config_file(rest))
        figures = report(own.topology, config, own.effort)
    except UserError as error:
        sys.exit(f"error: {error}")
    if own.json:
        write_file(own.json, json.dumps(figures, indent=1) + "\n")
    if not figures["fits"]:
        sys.exit(1)


def check_json(file: Path, config: TrainConfig, config_path: Path | None) -> None:
    """Check that `file` is a new file or an earlier report, and that its folder exists.

    Raises:
        OutputError: `file` fails this check, or it is an input of this command or of the training, or it is inside an
            input folder.
    """
    from ra_jax.checkpoints import BEST_DIR, CHECKPOINT_DIR  # imported here, after parsing, because it is slow

    models = ("pretrained_model_name_or_path", "pretrained_redux_model_name_or_path")
    named = {name: getattr(config.model, name) for name in models}
    named |= {name: getattr(config.data, name) for name in ("train_json_path", "val_json_path")}
    named |= {name: getattr(config.run, name) for name in ("init_experts_from", "resume_from_checkpoint")}
    named["config"] = config_path
    read = {f"--{name}": [Path(path).expanduser()] for name, path in named.items() if path not in (None, UNUSED)}
    for flag in {"--init_experts_from", "--resume_from_checkpoint"} & read.keys():
        run = read[flag][0]
        read[flag] = [run / folder for folder in (CHECKPOINT_DIR, BEST_DIR) if (run / folder).is_dir()] or [run]
    check_outputs(Outputs("--json", files=[file]), {}, read)
    if not file.parent.is_dir():
        raise OutputError(f"--json {file}: there is no folder {file.parent}; make it, or choose another --json")
    if (file.exists() or file.is_symlink()) and not _is_report(file):
        raise OutputError(
            f"--json {file}: is there already, and is not what an earlier compilation wrote, a JSON object with "
            "topology and fits; move it, or choose another --json"
        )


def _is_report(file: Path) -> bool:
    """Return whether the file is a report of this command: a JSON object with the keys topology and fits."""
    if not file.is_file():
        return False
    try:
        figures = json.loads(file.read_bytes())
    except ValueError:  # not JSON or not UTF-8
        return False
    return isinstance(figures, dict) and {"topology", "fits"} <= figures.keys()


def set_effort(effort: str) -> None:
    """Set how long XLA searches for a fast program.

    With O1, compilation takes as long as with an effort of -1, and the programs need as much memory.
    """
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):
        jax.config.update("jax_exec_time_optimization_effort", EFFORTS[effort])
    else:
        jax.config.update("jax_optimization_level", LEVELS[effort])


def report(topology: str, config: TrainConfig, effort: str = "quick") -> dict:
    """Compile the step, print the table, and return its figures.

    If the step does not fit, compile smaller configurations until one fits. The returned dictionary then names the
    flags of that configuration under `proposal`.
    """
    jax.config.update("jax_platforms", "cpu")
    set_effort(effort)
    # Imported here, after parsing: --help and flag errors do not wait for these slow imports.
    from ra_jax.aot.abstract_step import smaller_configs
    from ra_jax.aot.topology import topology_devices

    devices, chip = topology_devices(topology)
    figures = {"effort": effort} | compile_and_measure(topology, config, devices, chip)
    print_figures(figures)
    if figures["fits"]:
        return figures
    for other in smaller_configs(config, len(devices)):
        changed = flag_diff(config, other)
        print(f"\ntrying {changed} …", flush=True)
        found = {"effort": effort} | compile_and_measure(topology, other, devices, chip)
        if found["fits"]:
            print_figures(found)
            print(f"\nit fits with {changed}")
            return figures | {"proposal": changed}
    print(f"\nnothing that was tried fits: take more chips, {', '.join(memory_advice(config))} or smaller buckets")
    return figures


def memory_advice(config: TrainConfig) -> list[str]:
    """Return flags that reduce memory but change the result of the training."""
    found = []
    if config.model.base_precision != "int8" and config.experts.use_lora:
        found.append("--base_precision int8")
    if config.experts.use_lora:
        found.append("a lower --lora_rank")
    if config.optimization.optimizer != "adafactor":
        found.append("--optimizer adafactor")
    if config.uses_policy:
        found.append("fewer --num_policy_timesteps")
    return found


def compile_and_measure(topology: str, config: TrainConfig, devices: list, chip) -> dict:
    """Compile the step and return its figures, which the table and the JSON file show."""
    from ra_jax.aot.abstract_step import trace
    from ra_jax.aot.roofline import Footprint, Roofline

    step = trace(config, devices)
    figures = {
        "topology": topology,
        "chips": len(devices),
        "mode": config.mode,
        "mesh": dict(step.partitioner.mesh.shape),
        "bucket": step.arguments[2]["mask"].shape[-2:],
        "train_batch_size": config.run.train_batch_size,
        "gradient_accumulation_steps": config.run.gradient_accumulation_steps,
        "gradient_checkpointing": config.model.gradient_checkpointing,
    }
    since = time.perf_counter()
    try:
        program = step.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return figures | {"fits": False, "refusal": str(error).splitlines()[0]}
    figures["compile_seconds"] = time.perf_counter() - since
    footprint, roofline = Footprint.of(program, chip), Roofline.of(program, step, chip)
    figures |= {
        "argument_bytes": footprint.arguments,
        "temporary_bytes": footprint.temporaries,
        "total_bytes": footprint.total,
        "chip_bytes": footprint.available,
        "base_weight_bytes": step.weights,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "fits": footprint.fits,
    }
    return figures | roofline.to_dict()


def print_figures(figures: dict) -> None:
    """Print the figures as a table."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    print(f"{figures['mode']} step on {figures['topology']}, {figures['chips']} chips, mesh {mesh}")
    print("panels of {} x {}, ".format(*figures["bucket"]), end="")
    print(f"batch {figures['train_batch_size']} x {figures['gradient_accumulation_steps']}, ", end="")
    print(f"gradient_checkpointing {figures['gradient_checkpointing']}\n")
    if "refusal" in figures:
        print(f"does not fit: the compiler found no place for it\n  {figures['refusal']}")
        return
    gigabytes = {name: figures[f"{name}_bytes"] / 1e9 for name in ("argument", "temporary", "total", "chip")}
    rows = [
        ("arguments a chip", f"{gigabytes['argument']:.2f} GB"),
        ("temporaries a chip", f"{gigabytes['temporary']:.2f} GB"),
        ("total of the chip's memory", f"{gigabytes['total']:.2f} of {gigabytes['chip']:.0f} GB"),
        ("model FLOPs a step", f"{figures['flops'] / 1e12:.1f} TFLOP"),
        ("compute at peak", f"{figures['compute_seconds']:.3f} s"),
        *((f"{kind}, sent by a chip", f"{sent / 1e9:.2f} GB") for kind, sent in figures["collective_bytes"].items()),
        ("communication at all links", f"{figures['collective_seconds']:.3f} s"),
        ("roofline time of a step", f"{figures['seconds']:.3f} s"),
        ("MFU at most", f"{figures['mfu_bound']:.0%}"),
        (f"compile time, {figures['effort']} effort", f"{figures['compile_seconds']:.0f} s"),
        ("host memory, peak", f"{figures['host_peak_bytes'] / 1e9:.1f} GB"),
    ]
    print("| | |\n| --- | --- |")
    for name, value in rows:
        print(f"| {name} | {value} |")
    print("\nit fits" if figures["fits"] else "\ndoes not fit")


def flag_diff(config: TrainConfig, other: TrainConfig) -> str:
    """Return the flags that turn `config` into `other`, as text for a command line."""
    before, after = to_flat_dict(config), to_flat_dict(other)
    return " ".join(f"--{name} {value}" for name, value in after.items() if value != before[name])


if __name__ == "__main__":
    main()
