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
    "Compiles the train step of a configuration for a TPU topology, without TPU hardware. Prints the memory that the "
    "step needs per chip, and a lower bound of its time. All flags of python -m ra_jax.train are accepted as well."
)
# --effort -> value of `jax_exec_time_optimization_effort`, an option of JAX up to 0.11.0.
EXEC_TIME_EFFORTS = {"quick": -1.0, "full": 0.0}
# --effort -> value of `jax_optimization_level`, which replaces this option from JAX 0.11.1 on. UNKNOWN is the default.
OPTIMIZATION_LEVELS = {"quick": "O1", "full": "UNKNOWN"}
PATH_FLAGS = ("--train_json_path", "--val_json_path", "--output_dir")  # flags of training whose paths are not read here
UNUSED_PATH = "unused"  # value of these flags if the user does not give them


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, compile and print. Exit with status 1 if the step does not fit or on a `UserError`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    parser = argparse.ArgumentParser(prog="python -m ra_jax.aot", description=DESCRIPTION)
    parser.add_argument(
        "--topology", required=True, help="kind of chip and size of the grid, such as v5e:4x4, v5p:2x2x1, v6e:2x4"
    )
    parser.add_argument(
        "--effort",
        choices=EXEC_TIME_EFFORTS,
        default="quick",
        help="full: compile as in training; quick: do not search for the fastest program, in a fifth of the time",
    )
    parser.add_argument("--json", type=Path, help="file to which the printed numbers are also written, as JSON")
    options, train_flags = parser.parse_known_args(argv)
    missing = [flag for flag in PATH_FLAGS if not any(token.startswith(flag) for token in train_flags)]
    try:
        config = parse([*(token for flag in missing for token in (flag, UNUSED_PATH)), *train_flags])
        if options.json:
            check_json(options.json, config, config_file(train_flags))
        results = report(options.topology, config, options.effort)
    except UserError as error:
        sys.exit(f"error: {error}")
    if options.json:
        write_file(options.json, json.dumps(results, indent=1) + "\n")
    if not results["fits"]:
        sys.exit(1)


def check_json(file: Path, config: TrainConfig, config_path: Path | None) -> None:
    """Check that `file` is a new file or an earlier report, and that its folder exists.

    Raises:
        OutputError: `file` fails this check, is an input of this command or of the training, or is inside an input
            folder.
    """
    from ra_jax.checkpoints import BEST_DIR, CHECKPOINT_DIR  # imported here, after parsing, because it is slow

    models = ("pretrained_model_name_or_path", "pretrained_redux_model_name_or_path")
    paths = {name: getattr(config.model, name) for name in models}
    paths |= {name: getattr(config.data, name) for name in ("train_json_path", "val_json_path")}
    paths |= {name: getattr(config.run, name) for name in ("init_experts_from", "resume_from_checkpoint")}
    paths["config"] = config_path
    inputs = {f"--{name}": [Path(path).expanduser()] for name, path in paths.items() if path not in (None, UNUSED_PATH)}
    for flag in {"--init_experts_from", "--resume_from_checkpoint"} & inputs.keys():
        run = inputs[flag][0]
        inputs[flag] = [run / folder for folder in (CHECKPOINT_DIR, BEST_DIR) if (run / folder).is_dir()] or [run]
    check_outputs(Outputs("--json", files=[file]), {}, inputs)
    if not file.parent.is_dir():
        raise OutputError(
            f"--json {file}: the folder {file.parent} does not exist; create it, or choose another --json"
        )
    if (file.exists() or file.is_symlink()) and not _is_report(file):
        raise OutputError(
            f"--json {file}: already exists, but is not the report of an earlier compilation (a JSON object with "
            "topology and fits); move it, or choose another --json"
        )


def _is_report(file: Path) -> bool:
    """Return whether the file is a report of this command: a JSON object with the keys topology and fits."""
    if not file.is_file():
        return False
    try:
        results = json.loads(file.read_bytes())
    except ValueError:  # not JSON or not UTF-8
        return False
    return isinstance(results, dict) and {"topology", "fits"} <= results.keys()


def set_effort(effort: str) -> None:
    """Set how long XLA searches for a fast program.

    Newer JAX has optimization levels instead of an effort. Level O1 has the compile time and the memory of effort -1.
    """
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):
        jax.config.update("jax_exec_time_optimization_effort", EXEC_TIME_EFFORTS[effort])
    else:
        jax.config.update("jax_optimization_level", OPTIMIZATION_LEVELS[effort])


def report(topology: str, config: TrainConfig, effort: str = "quick") -> dict:
    """Compile the step, print the table, and return the numbers of the table by name.

    If the step does not fit, compile smaller configurations until one fits. The key `proposal` of the result then has
    the flags of this configuration.
    """
    jax.config.update("jax_platforms", "cpu")
    set_effort(effort)
    # Imported here, after parsing: --help and flag errors do not wait for these slow imports.
    from ra_jax.aot.abstract_step import smaller_configs
    from ra_jax.aot.topology import topology_devices

    devices, chip = topology_devices(topology)
    results = {"effort": effort} | compile_and_measure(topology, config, devices, chip)
    print_results(results)
    if results["fits"]:
        return results
    for smaller in smaller_configs(config, len(devices)):
        flags = flag_diff(config, smaller)
        print(f"\ntrying {flags} …", flush=True)
        smaller_results = {"effort": effort} | compile_and_measure(topology, smaller, devices, chip)
        if smaller_results["fits"]:
            print_results(smaller_results)
            print(f"\nthe step fits with {flags}")
            return results | {"proposal": flags}
    advice = ", ".join(["more chips", *memory_advice(config)])
    print(f"\nnone of these configurations fits; use {advice} or smaller --aspect_ratio_buckets")
    return results


def memory_advice(config: TrainConfig) -> list[str]:
    """List flag changes that reduce memory. They also change the result of the training."""
    advice = []
    if config.model.base_precision != "int8" and config.experts.use_lora:
        advice.append("--base_precision int8")
    if config.experts.use_lora:
        advice.append("a lower --lora_rank")
    if config.optimization.optimizer != "adafactor":
        advice.append("--optimizer adafactor")
    if config.uses_policy:
        advice.append("fewer --num_policy_timesteps")
    return advice


def compile_and_measure(topology: str, config: TrainConfig, devices: list, chip) -> dict:
    """Compile the step, and return the numbers for the table and the JSON file by name."""
    from ra_jax.aot.abstract_step import build_abstract_step
    from ra_jax.aot.roofline import Footprint, Roofline

    step = build_abstract_step(config, devices)
    results = {
        "topology": topology,
        "chips": len(devices),
        "mode": config.mode,
        "mesh": dict(step.partitioner.mesh.shape),
        "bucket": step.arguments[2]["mask"].shape[-2:],
        "train_batch_size": config.run.train_batch_size,
        "gradient_accumulation_steps": config.run.gradient_accumulation_steps,
        "gradient_checkpointing": config.model.gradient_checkpointing,
    }
    start = time.perf_counter()
    try:
        program = step.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return results | {"fits": False, "refusal": str(error).splitlines()[0]}
    results["compile_seconds"] = time.perf_counter() - start
    footprint, roofline = Footprint.from_program(program, chip), Roofline.from_program(program, step, chip)
    results |= {
        "argument_bytes": footprint.arguments,
        "temporary_bytes": footprint.temporaries,
        "total_bytes": footprint.total,
        "chip_bytes": footprint.available,
        "base_weight_bytes": step.base_bytes,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "fits": footprint.fits,
    }
    return results | roofline.to_dict()


def print_results(results: dict) -> None:
    """Print the result of `compile_and_measure` as a table."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in results["mesh"].items())
    print(f"{results['mode']} step on {results['topology']}, {results['chips']} chips, mesh {mesh}")
    settings = ("train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    print("panels of {} x {} pixels, ".format(*results["bucket"]), end="")
    print(", ".join(f"{name} {results[name]}" for name in settings), end="\n\n")
    if "refusal" in results:
        print(f"the step does not fit: compilation needs more memory than the chip has\n  {results['refusal']}")
        return
    gigabytes = {name: results[f"{name}_bytes"] / 1e9 for name in ("argument", "temporary", "total", "chip")}
    rows = [
        ("arguments per chip", f"{gigabytes['argument']:.2f} GB"),
        ("temporaries per chip", f"{gigabytes['temporary']:.2f} GB"),
        ("total per chip", f"{gigabytes['total']:.2f} of {gigabytes['chip']:.0f} GB"),
        ("model FLOPs per step", f"{results['flops'] / 1e12:.1f} TFLOP"),
        ("compute time at peak rate", f"{results['compute_seconds']:.3f} s"),
        *((f"{kind}, sent per chip", f"{sent / 1e9:.2f} GB") for kind, sent in results["collective_bytes"].items()),
        ("communication time at full bandwidth", f"{results['collective_seconds']:.3f} s"),
        ("lower bound of the step time (roofline)", f"{results['seconds']:.3f} s"),
        ("upper bound of the MFU", f"{results['mfu_bound']:.0%}"),
        (f"compile time, {results['effort']} effort", f"{results['compile_seconds']:.0f} s"),
        ("peak host memory", f"{results['host_peak_bytes'] / 1e9:.1f} GB"),
    ]
    print("| | |\n| --- | --- |")
    for name, value in rows:
        print(f"| {name} | {value} |")
    print("\nthe step fits" if results["fits"] else "\nthe step does not fit")


def flag_diff(config: TrainConfig, other: TrainConfig) -> str:
    """Return the flags that turn `config` into `other`, as text for a command line."""
    before, after = to_flat_dict(config), to_flat_dict(other)
    return " ".join(f"--{name} {value}" for name, value in after.items() if value != before[name])


if __name__ == "__main__":
    main()
