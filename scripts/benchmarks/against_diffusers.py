"""Compare the time and memory of a training step with diffusers and PEFT on the same machine.

    python scripts/benchmarks/against_diffusers.py [--rounds 7] [--geometries tiny small wide]
    python scripts/benchmarks/against_diffusers.py --our_python .venv/bin/python .venv-3.13/bin/python
        ra_jax on two JAX versions, and one process of PyTorch
    python scripts/benchmarks/against_diffusers.py --geometries flux flux_6
        on a GPU: the sizes of FLUX.1-Fill, 512 x 1024, with four and with six photos

Both train three LoRA experts on the linear layers of all blocks. A step starts from latents: it interpolates, predicts
the velocity, computes the flow-matching loss and the gradient of the experts, and applies AdamW. The contenders are:

    ra_jax             the step of ra_jax.train, with router and diversity loss
    diffusers + PEFT   FluxTransformer2DModel with three active adapters, each with weight 1/3
    ra_jax, one LoRA   ra_jax with one expert of the same total rank

All compute in float32 on a CPU and in bfloat16 on a GPU. On a GPU torch.compile compiles the blocks of diffusers, and
they are recomputed only if memory runs out; ra_jax recomputes what --gradient_checkpointing says.

Each contender is a separate process. The processes take turns, one step each, so that a change in the machine's load
affects all of them. At the sizes of FLUX.1-Fill two processes do not fit on a GPU; there they run one after another.

The output has, for each contender, the median time of a step, its ratio to ra_jax, and two peaks of memory: one of the
steps, and one that includes compilation (on a GPU, the device's peak). On a GPU of `PEAKS` in contenders.py it has MFU,
the fraction of the GPU's peak FLOP/s that the step reaches. Model FLOPs count the forward pass and the gradients with
respect to activations and experts, without recomputation. At the end it has the compile time for several numbers of
blocks.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

SCRIPT = Path(__file__).with_name("contenders.py")  # runs as the process of a contender
OURS, THEIRS, ONE_LORA = "ra_jax", "diffusers + PEFT", "ra_jax, one LoRA"
CONTENDERS = (OURS, THEIRS, ONE_LORA)

Sizes = dict[str, int | tuple[int, int]]  # fields of `Geometry` in contenders.py
GEOMETRIES: dict[str, Sizes] = {
    "tiny": {"heads": 4, "head_dim": 64, "double": 2, "single": 4, "grid": (16, 16), "context": 64, "batch": 2},
    "small": {"heads": 8, "head_dim": 64, "double": 3, "single": 6, "grid": (16, 32), "context": 128, "batch": 1},
    "wide": {"heads": 8, "head_dim": 128, "double": 2, "single": 4, "grid": (16, 32), "context": 128, "batch": 1},
}
FLUX: Sizes = {
    "heads": 24,
    "head_dim": 128,
    "double": 19,
    "single": 38,
    "grid": (32, 64),
    "context": 512 + 729,  # prompt and Redux tokens
    "batch": 4,
    "joint_dim": 4096,
    "pooled_dim": 768,
    "rank": 64,
}
LARGE = {"flux": FLUX, "flux_6": FLUX | {"batch": 6}}  # two contenders do not fit on a GPU
PROCESSOR = {"model name": "", "cpu family": "family ", "model": "model "}  # field of /proc/cpuinfo -> its title


@dataclass(frozen=True)
class Bench:
    """Settings of the comparison."""

    rounds: int = 7  # timed steps of each contender; two steps before them are not timed
    geometries: tuple[str, ...] = tuple(GEOMETRIES)  # sizes of model and batch: tiny, small, wide, flux, flux_6
    contenders: tuple[str, ...] = CONTENDERS  # contenders to run; ra_jax has to be one of them
    # Interpreters that run ra_jax, each with its own JAX. PyTorch always runs in the interpreter of this script.
    our_python: tuple[str, ...] = (sys.executable,)
    gradient_checkpointing: str = "products"  # --gradient_checkpointing of ra_jax on a GPU
    compile_blocks: tuple[int, ...] = (8, 57)  # numbers of blocks to compare compile times of; may be empty
    json: Path | None = None  # file to write the figures to
    trace: Path | None = None  # folder for a profile of one step of ra_jax


def is_this_python(python: str) -> bool:
    """Return whether `python` is the interpreter of this process, of the same environment."""
    # Links are not resolved: the python of an environment is a link to an interpreter outside.
    return os.path.abspath(shutil.which(python)) == os.path.abspath(sys.executable)


def child_environment(python: str) -> dict[str, str]:
    """Return the environment variables for a contender that `python` runs: those of this process, with exceptions."""
    removed = {"JAX_COMPILATION_CACHE_DIR"}  # compile times are measured, so nothing may be cached
    if not is_this_python(python):
        removed.add("XLA_FLAGS")  # another JAX version aborts at a flag that it does not know
    variables = {name: value for name, value in os.environ.items() if name not in removed}
    return variables | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # contenders may share a GPU


class Contender:
    """A process that takes a training step on request.

    Args:
        name: one of `CONTENDERS`.
        python: the interpreter that runs it.
        geometry: sizes of model and batch.
        bench: settings.

    Attributes:
        facts: its figures from before the timed steps, such as compile time and versions.
    """

    def __init__(self, name: str, python: str, geometry: Sizes, bench: Bench):
        trace = str(bench.trace) if bench.trace and name == OURS else None
        options = {"gradient_checkpointing": bench.gradient_checkpointing, "trace": trace}
        command = [python, str(SCRIPT), name, json.dumps(geometry), json.dumps(options)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_environment(python)
        )
        self.facts = self._answer() | {"contender": name}

    def _answer(self) -> dict:
        if not (line := self._process.stdout.readline()):
            python, _, name, *_ = self._process.args
            sys.exit(f"contender {name}, run by {python}, ended; its error is printed above")
        return json.loads(line)

    def step(self) -> dict[str, float]:
        """Take a step; return its `seconds`, and the `peak` of memory in bytes so far."""
        print(file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def measure(bench: Bench, geometry: Sizes, *, together: bool) -> dict[str, dict]:
    """Run all contenders on one geometry.

    Args:
        bench: settings.
        geometry: sizes of model and batch.
        together: the processes of all contenders run at once and take turns; otherwise they run one after another.

    Returns:
        for each contender, by name and versions: median `seconds` of a step, `peak` memory in bytes, and its facts.
    """
    programs = [
        (name, python)
        for name in bench.contenders
        for python in ((sys.executable,) if name == THEIRS else bench.our_python)
    ]
    results = {}
    for simultaneous in [programs] if together else [[program] for program in programs]:
        contenders = [Contender(name, python, geometry, bench) for name, python in simultaneous]
        rounds = [[contender.step() for contender in contenders] for _ in range(bench.rounds)]
        for contender, steps in zip(contenders, zip(*rounds, strict=True), strict=True):
            contender.close()
            seconds = float(np.median([step["seconds"] for step in steps]))
            figures = {"seconds": seconds, "peak": max(step["peak"] for step in steps), **contender.facts}
            name = f"{figures['contender']} ({figures['versions']})"
            if name in results:
                sys.exit(
                    f"--our_python: two interpreters have {figures['versions']}; give interpreters that differ in the "
                    "version of Python or JAX"
                )
            results[name] = figures
    return results


def compare(bench: Bench, name: str) -> dict[str, dict]:
    """Run `measure` on a geometry, print a row for each contender, and return the figures."""
    results = measure(bench, (GEOMETRIES | LARGE)[name], together=name not in LARGE)
    if len({figures["trained"] for figures in results.values()}) > 1:
        sys.exit(f"{name}: the contenders train different numbers of parameters: {results}")
    ours = next(figures for figures in results.values() if figures["contender"] == OURS)
    for contender, figures in results.items():
        ratio = figures["seconds"] / ours["seconds"]
        peaks = f"{figures['peak'] / 1e9:.2f} GB", f"{max(figures['peak'], figures['peak_before']) / 1e9:.2f} GB"
        row = [name, contender, f"{figures['seconds']:.3f} s", f"{ratio:.3f}", *peaks]
        if ours["peak_flops"]:
            row.append(f"{ours['flops'] / figures['seconds'] / ours['peak_flops']:.1%}")
        if figures.get("recomputes"):
            row[1] += ", recomputing blocks"
        print("| " + " | ".join(row) + " |", flush=True)
    return results


def print_ratios(results: dict[str, dict[str, dict]]) -> None:
    """Print the time of diffusers' step divided by that of each ra_jax, for all geometries and as geometric mean."""
    first = next(iter(results.values()))
    ours = [name for name, figures in first.items() if figures["contender"] == OURS]
    theirs = next((name for name, figures in first.items() if figures["contender"] == THEIRS), None)
    if theirs is None:
        return
    print()
    for our_name in ours:
        ratios = [figures[theirs]["seconds"] / figures[our_name]["seconds"] for figures in results.values()]
        mean = float(np.exp(np.log(ratios).mean()))
        by_geometry = ", ".join(f"{name} {ratio:.2f}" for name, ratio in zip(results, ratios, strict=True))
        print(f"{THEIRS} / {our_name}: {by_geometry}; geometric mean {mean:.2f}, minimum {min(ratios):.2f}")


def compile_seconds(blocks: int, python: str, bench: Bench) -> float:
    """Measure the seconds to compile a step with this number of blocks, a third of them double blocks."""
    double = blocks // 3
    geometry = {"heads": 2, "head_dim": 32, "double": double, "single": blocks - double}
    geometry |= {"grid": (8, 8), "context": 8, "batch": 1}
    contender = Contender(OURS, python, geometry, replace(bench, trace=None))
    contender.close()
    return contender.facts["compile"]


def processor() -> str:
    """Return the processor's name, family and model, as far as the system provides them."""
    if not (file := Path("/proc/cpuinfo")).exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in file.read_text().split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    parts = [f"{title}{fields[name]}" for name, title in PROCESSOR.items() if name in fields]
    return ", ".join(parts) or platform.machine()


def check(bench: Bench) -> None:
    """Exit with a message if a contender, a geometry or an interpreter does not exist."""
    if OURS not in bench.contenders or not set(bench.contenders) <= set(CONTENDERS):
        sys.exit(
            f"--contenders {' '.join(bench.contenders)}: expected some of {', '.join(CONTENDERS)}, including {OURS}"
        )
    if unknown := [name for name in bench.geometries if name not in GEOMETRIES | LARGE]:
        sys.exit(f"--geometries {' '.join(unknown)}: expected some of {', '.join(GEOMETRIES | LARGE)}")
    if missing := [python for python in bench.our_python if not shutil.which(python)]:
        sys.exit(f"--our_python {' '.join(missing)}: no such program; give the path of an interpreter that has ra_jax")
    other_pythons = [python for python in bench.our_python if not is_this_python(python)]
    if other_pythons and "XLA_FLAGS" in os.environ:
        print(f"XLA_FLAGS are not passed to {', '.join(other_pythons)}", file=sys.stderr)


def main(bench: Bench) -> None:
    """Run the comparison and print its tables."""
    check(bench)
    print(f"{processor()}, {os.cpu_count()} CPUs\n")
    heads = ["geometry", "contender", "step", "ratio to ra_jax", "peak of steps", "with compilation", "MFU if known"]
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    results = {name: compare(bench, name) for name in bench.geometries}
    print_ratios(results)
    times = {
        python: {blocks: compile_seconds(blocks, python, bench) for blocks in bench.compile_blocks}
        for python in (bench.our_python if bench.compile_blocks else ())
    }
    for python, by_blocks in times.items():
        listed = ", ".join(f"{blocks} blocks {seconds:.1f} s" for blocks, seconds in by_blocks.items())
        ratio = by_blocks[max(by_blocks)] / by_blocks[min(by_blocks)]
        print(f"compile time by {python}: {listed}; ratio {ratio:.2f}")
    if bench.json:
        bench.json.write_text(json.dumps({"results": results, "compile": times}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__, use_underscores=True))
