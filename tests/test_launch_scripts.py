"""The launch scripts print the commands that they would run, and name the variables that they need."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["--config", "configs/flux_fill_auto.toml", "--train_json_path", "my data.json"]
TPU = {"TPU": "slice", "ZONE": "z"}
GKE = {"CLUSTER": "c", "ZONE": "z", "TPU_TYPE": "v6e-8", "IMAGE": "r/i"}
CASES = [
    ("gpu.sh", {"GPUS": "0"}, ["python", "-m", "ra_jax.train", *FLAGS]),
    ("gpu.sh", {"GPUS": "0,3"}, ["python", "-m", "ra_jax.train", *FLAGS, "--mesh_fsdp", "2"]),
    ("slurm.sbatch", {}, ["srun", "--kill-on-bad-exit=1", ".venv/bin/python", "-m", "ra_jax.train", *FLAGS]),
    ("tpu_pod.sh train", TPU, None),
    ("tpu_queued.sh", TPU | {"TYPE": "v5p-8"}, None),
    ("xpk.sh", GKE, None),
]


def run_script(script: str, environment: dict, *arguments: str) -> subprocess.CompletedProcess:
    name, *command = script.split()
    inherited = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(
        ["bash", ROOT / "scripts" / "launch" / name, "--dry_run", *command, *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_dry_run_may_be_at_any_position():
    result = run_script("gpu.sh", {"GPUS": "2"}, *FLAGS)
    last = subprocess.run(
        ["bash", ROOT / "scripts" / "launch" / "gpu.sh", *FLAGS, "--dry_run"],
        env={"PATH": os.environ["PATH"], "GPUS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert last.stdout == result.stdout
    assert "export CUDA_VISIBLE_DEVICES=2\n" in result.stdout and "export JAX_PLATFORMS=cuda" in result.stdout


def test_xla_flags_of_the_user_come_last():
    result = run_script("gpu.sh", {"GPUS": "2", "XLA_FLAGS": "--xla_own=1"}, *FLAGS)
    (flags,) = [shlex.split(line)[1] for line in result.stdout.splitlines() if line.startswith("export XLA_FLAGS")]
    assert flags.startswith("XLA_FLAGS=--xla_gpu") and flags.endswith(" --xla_own=1")


@pytest.mark.parametrize(("script", "environment", "expected"), CASES, ids=[f"{c[0]}-{len(c[1])}" for c in CASES])
def test_a_dry_run_prints_the_command_with_its_flags_quoted(script, environment, expected):
    result = run_script(script, environment, *FLAGS)
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("export ")]
    if expected is not None:
        assert commands == [expected]
        return
    # A shell on the remote machine parses the command again.
    remote = next(word for words in commands for word in words if "ra_jax.train" in word)
    inner = shlex.split(remote.rsplit("&&", 1)[1])
    assert inner[inner.index("ra_jax.train") + 1 :] == FLAGS


@pytest.mark.parametrize(("script", "environment"), [(case[0], case[1]) for case in CASES])
def test_without_flags_a_script_prints_its_usage(script, environment):
    result = run_script(script, environment)
    assert result.returncode == 2 and f"scripts/launch/{script.split()[0]}" in result.stderr


@pytest.mark.parametrize("script", ["tpu_pod.sh train", "tpu_queued.sh", "xpk.sh"])
def test_a_missing_variable_is_named(script):
    result = run_script(script, {}, *FLAGS)
    assert result.returncode == 2 and "is not set" in result.stderr
