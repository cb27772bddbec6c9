"""scripts/environment.sh and the scripts that use it: interpreters, folders, installed extras, and started programs.

The interpreters are fake. PATH has only them and the programs that the scripts need.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = ("bash", "cat", "cksum", "cp", "dirname", "grep", "mkdir", "sed", "sort")

# A fake interpreter. It prints its version, makes environments with a copy of itself, and logs all other calls. The
# fake pip, which also serves as ruff, only logs its calls.
PYTHON = """#!{bash}
case "$1 $2" in
-c*) echo {version} ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "{pip}" "$3/bin/pip" && cp "{pip}" "$3/bin/ruff" ;;
*) echo "$0 $*" >>{log} ;;
esac
"""
PIP = """#!{bash}
echo "$0 $*" >>{log}
"""
BROKEN = """#!{bash}
echo "pyenv: python: command not found" >&2
exit 127
"""


class Machine:
    """A project folder, a folder of programs for PATH, a folder of pyenv's versions, and a log of started programs."""

    def __init__(self, folder: Path):
        self.bin, self.project, self.pyenv = folder / "bin", folder / "project", folder / "pyenv"
        self.log = folder / "log"
        self.bin.mkdir()
        for program in PROGRAMS:
            (self.bin / program).symlink_to(shutil.which(program))
        self.write(folder / "pip", PIP, log=self.log)
        self.pip = folder / "pip"
        for name in (".ci/run", "scripts/demo.sh", "scripts/environment.sh", "scripts/test.sh"):
            (self.project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.project / name)
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.project / name)

    def write(self, path: Path, text: str, **values) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(bash=self.bin / "bash", **values))
        path.chmod(0o755)

    def python(self, path: str | Path, version: str) -> Path:
        """Write an interpreter to a path, or to PATH if only a name is given."""
        path = self.bin / path
        self.write(path, PYTHON, version=version, pip=self.pip, log=self.log)
        return path

    def install_pyenv(self, *versions: str) -> None:
        """Install a pyenv with these versions; its shims on PATH do not run."""
        self.write(self.bin / "pyenv", f"#!{{bash}}\n[ $1 = root ] && echo {self.pyenv}\n")
        for version in versions:
            self.python(self.pyenv / "versions" / version / "bin" / "python", version.rpartition(".")[0])
            self.write(self.bin / f"python{version.rpartition('.')[0]}", BROKEN)

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess:
        """Source environment.sh as the scripts do, and run a command."""
        return self.start(
            "-c", f"set -euo pipefail; source scripts/environment.sh; {command}", "test.sh", **environment
        )

    def start(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Run bash in the project's folder."""
        return subprocess.run(
            [self.bin / "bash", *arguments],
            cwd=self.project,
            env={"PATH": str(self.bin)} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def find(self, *names: str, **environment: str) -> str:
        result = self.run(f"find_python {' '.join(names)}", **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def read_log(self) -> list[str]:
        """Return the calls of interpreters, pip and ruff since the last call of this method, one line each."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_the_first_version_that_runs_is_found(machine):
    machine.python("python3.12", "3.12")
    machine.python("python3.11", "3.11")
    assert machine.find("3.11", "3.12", "3.13") == "python3.11"
    assert machine.find("3.13", "3.12", "3.11") == "python3.12"


def test_pyenvs_newest_version_is_found_if_its_shim_does_not_run(machine):
    machine.install_pyenv("3.13.0", "3.13.9", "3.13.10", "3.13.11t", "3.12.1")
    assert machine.find("3.13", "3.12") == str(machine.pyenv / "versions/3.13.10/bin/python")
    machine.python("python3.13", "3.13")
    assert machine.find("3.13", "3.12") == "python3.13"


def test_a_python_before_311_is_skipped(machine):
    machine.python("python3", "3.10")
    machine.python("python", "3.14")
    assert machine.find("3.11", "python3", "python") == "python"


def test_the_users_python_is_used_or_refused(machine):
    machine.python("python3.11", "3.11")
    chosen = machine.python(machine.project / "my pythons" / "python", "3.12")
    assert machine.find("3.11", PYTHON=str(chosen)) == str(chosen)
    assert machine.find("3.12", PYTHON="3.11") == "python3.11"
    result = machine.run("python=$(find_python 3.11); echo not reached", PYTHON="/nowhere/python")
    assert result.returncode != 0 and result.stdout == ""
    assert "No Python 3.11 or later runs as /nowhere/python" in result.stderr


def test_without_a_python_the_error_lists_the_names_that_were_tried(machine):
    machine.python("python3", "3.9")
    result = machine.run("find_python 3.13 3.12 python3")
    assert result.returncode != 0 and result.stdout == ""
    assert "No Python 3.11 or later runs as 3.13, 3.12, python3: install one, or give its path" in result.stderr


def test_a_second_version_gets_a_folder_with_the_version_in_its_name(machine):
    for version in ("3.11", "3.13"):
        machine.python(f"python{version}", version)
    expected = [("python3.11", ".venv", "3.11"), ("python3.13", ".venv-3.13", "3.13"), ("python3.11", ".venv", "3.11")]
    for python, folder, version in expected:
        result = machine.run(f'environment {python} test; echo "venv=$venv"')
        assert result.returncode == 0, result.stderr
        assert f"Environment: {folder}, Python {version}\n" in result.stdout
        assert result.stdout.endswith(f"venv={folder}\n")
        assert (machine.project / folder / "bin" / "python").exists()
    assert [line.split()[0] for line in machine.read_log()] == [".venv/bin/pip", ".venv-3.13/bin/pip"]


def test_an_environment_whose_python_does_not_run_is_not_changed(machine):
    machine.python("python3.12", "3.12")
    (machine.project / ".venv").mkdir()
    assert "Environment: .venv-3.12, Python 3.12\n" in machine.run("environment python3.12").stdout
    assert os.listdir(machine.project / ".venv") == []


@pytest.mark.parametrize(("version", "extras"), [("3.11", "test,torch,packs"), ("3.12", "test,packs")])
def test_torch_is_installed_on_311_only_and_packages_again_if_pins_change(machine, version, extras):
    machine.python("python", version)
    install = "environment python test torch packs"
    for _ in range(2):
        assert machine.run(install).returncode == 0
    (line,) = machine.read_log()
    assert line.endswith(f"-c constraints.txt -e .[{extras}]")
    with (machine.project / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert machine.run(install).returncode == 0
    assert machine.read_log() == [line]
    assert machine.run("environment python").returncode == 0
    assert machine.read_log()[0].endswith("-c constraints.txt -e .")


def test_an_installation_that_failed_is_tried_again(machine):
    machine.python("python", "3.12")
    machine.write(machine.pip, "#!{bash}\nexit 1\n")
    result = machine.run("environment python; echo not reached")
    assert result.returncode == 1 and "not reached" not in result.stdout
    machine.write(machine.project / ".venv/bin/pip", PIP, log=machine.log)
    assert machine.run("environment python").returncode == 0
    assert len(machine.read_log()) == 1


def test_the_suite_prefers_311_and_passes_its_arguments_on(machine):
    machine.python("python3.13", "3.13")
    assert machine.start("scripts/test.sh", "tests/data", "-x").returncode == 0
    pip, *ruff, pytest = machine.read_log()
    assert pip.endswith("-e .[test,metrics,packs]")
    assert [line.split()[:2] for line in ruff] == [[".venv/bin/ruff", word] for word in ("check", "format")]
    assert pytest.startswith(".venv/bin/python -m pytest ") and pytest.endswith(" tests/data -x")
    machine.python("python3.11", "3.11")
    assert machine.start("scripts/test.sh").returncode == 0
    pip, *_, pytest = machine.read_log()
    assert pip.startswith(".venv-3.11/bin/pip ") and pip.endswith("-e .[test,torch,metrics,packs]")
    assert pytest.startswith(".venv-3.11/bin/python -m pytest ")
    assert machine.start("scripts/test.sh", PYTHON="python3.13").returncode == 0
    assert machine.read_log()[-1].startswith(".venv/bin/python -m pytest ")


def test_the_demo_uses_the_newest_python_that_is_pinned(machine):
    for version in ("3.11", "3.12", "3.14"):
        machine.python(f"python{version}", version)
    result = machine.start("scripts/demo.sh", "--learning_rate", "1e-3")
    assert result.returncode == 0, result.stderr
    assert "Environment: .venv, Python 3.12\n" in result.stdout
    assert result.stdout.endswith("source .venv/bin/activate\n")
    _, *programs = machine.read_log()
    names = ["demo", "train", "infer"]
    assert [line.split()[:3] for line in programs] == [[".venv/bin/python", "-m", f"ra_jax.{name}"] for name in names]
    assert "--learning_rate 1e-3" in programs[1]


def list_suites(machine) -> list[str]:
    return [line.split()[0] for line in machine.read_log() if " -m pytest " in line]


def test_ci_tests_on_311_and_on_the_newest_pinned(machine):
    machine.install_pyenv("3.12.1", "3.13.0")
    machine.python("python3.11", "3.11")
    result = machine.start(".ci/run", PYTHON="python3.11")
    assert result.returncode == 0, result.stderr
    assert list_suites(machine) == [".venv/bin/python", ".venv-3.13/bin/python"]


def test_ci_says_that_no_newer_python_was_found(machine):
    machine.python("python3.11", "3.11")
    result = machine.start(".ci/run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("Not tested on the newest JAX: no Python 3.13 or 3.12 was found\n")
    assert list_suites(machine) == [".venv/bin/python"]


def test_ci_needs_311_and_ends_if_a_suite_fails(machine):
    machine.python("python3.13", "3.13")
    result = machine.start(".ci/run")
    assert result.returncode != 0 and "No Python 3.11 or later runs as 3.11" in result.stderr
    assert list_suites(machine) == []
    failing = PYTHON.replace(">>{log} ;;", ">>{log}; exit 1 ;;")
    machine.write(machine.bin / "python3.11", failing, version="3.11", pip=machine.pip, log=machine.log)
    assert machine.start(".ci/run").returncode == 1
    assert list_suites(machine) == [".venv/bin/python"]
