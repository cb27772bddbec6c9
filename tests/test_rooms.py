"""The house: which room may import which, and how large a file, a function or a list of parameters may grow."""

import ast
import re
from collections import Counter, defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ra_jax"

# Rooms from the ground up. A room imports from floors below its own, and from itself.
FLOORS = (
    {"version", "xla_flags", "errors", "moved"},
    {"outputs"},
    {"config", "data", "rewards"},
    {"parallel"},
    {"models", "optimizers"},
    {"interop", "flow"},
    {"checkpoints"},
    {"rl"},
    {"inference"},
    {"evaluation", "reporting", "pipeline"},
    {"run_folder"},
    {"training"},
    {"__init__", "aot", "demo", "train", "infer", "evaluate"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@cache
def modules():
    """Every module of the package by its dotted name: a file, or a package's `__init__`."""
    paths = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(parts): path for path, parts in paths.items()}


def room_of(module):
    """The room of a module; a `__main__` is an entry wherever it lies."""
    return "__main__" if module.endswith("__main__") else module.partition(".")[0]


def imports(path):
    """The modules of the package that a file imports, anywhere in it: in functions and for types, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    known = modules()
    names = {f"{name}."[len("ra_jax.") :] for name in found if name.split(".")[0] == "ra_jax"}
    return {found for name in names for found in (name.removesuffix("."), f"{name}__init__") if found in known}


def test_every_room_imports_from_lower_floors_only():
    up = [
        f"{module} imports {other}"
        for module, path in modules().items()
        for other in imports(path)
        if room_of(module) != room_of(other) and FLOOR[room_of(other)] >= FLOOR[room_of(module)]
    ]
    assert not up


def test_no_imports_go_in_a_circle():
    graph = defaultdict(set, {module: imports(path) for module, path in modules().items()})
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def functions(tree):
    """Every function of a file, methods and nested ones too."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function):
    """The names of a function's parameters, `self` and `cls` aside."""
    spec = function.args
    given = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    return [argument.arg for argument in given if argument.arg not in ("self", "cls")]


def public(tree, prefix=""):
    """Every public class, function and method of a file, by its qualified name."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found[prefix + node.name] = node
            if isinstance(node, ast.ClassDef):
                found |= public(node, f"{node.name}.")
    return found


@pytest.mark.parametrize("folder", ["ra_jax", "scripts", "tests"])
def test_no_file_and_no_function_is_too_long(folder):
    files = {path: path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py")}
    assert not [path for path, text in files.items() if text.count("\n") > 450]
    long = [
        f"{path}:{function.name}"
        for path, text in files.items()
        for function in functions(ast.parse(text))
        if function.end_lineno - function.lineno >= 60
    ]
    assert not long


@pytest.mark.parametrize("folder", ["ra_jax", "scripts"])
def test_no_function_takes_more_than_seven_parameters(folder):
    """But `RemovalPipeline.__call__`, whose eight are the public interface."""
    many = [
        f"{path.relative_to(ROOT)}:{function.name}"
        for path in (ROOT / folder).rglob("*.py")
        for function in functions(ast.parse(path.read_text(encoding="utf-8")))
        if len(parameters(function)) > 7
    ]
    assert many == (["ra_jax/pipeline.py:__call__"] if folder == "ra_jax" else [])


def test_everything_public_has_a_docstring():
    bare = [
        f"{module}:{name}"
        for module, path in modules().items()
        for name, node in public(ast.parse(path.read_text(encoding="utf-8"))).items()
        if not ast.get_docstring(node)
    ]
    assert not bare


def test_no_room_outgrows_the_house():
    """The largest room has at most 18 % of the lines; training at most 14 files beside the compiled step."""
    lines = Counter()
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".py", ".css", ".js"):
            lines[path.relative_to(PACKAGE).parts[0]] += path.read_text(encoding="utf-8").count("\n")
    room, largest = lines.most_common(1)[0]
    assert largest <= 0.18 * lines.total(), room
    assert len(list((PACKAGE / "training").glob("*.py"))) <= 14


def test_the_design_has_the_same_floors():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| (\d+) \| ([^|]*) \|", text)
    floors = {int(number): set(re.findall(r"`([\w/.]+?)(?:/|\.py)?`", rooms)) for number, rooms in rows}
    assert floors == {number: rooms - {"__init__"} for number, rooms in enumerate(FLOORS, 1)}
