"""The house: which room may import which, and how large a file, a function or a list of parameters may grow."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ra_jax"

# Rooms from the ground up. A room imports from floors below its own, and from itself.
FLOORS = (
    {"version", "xla_flags", "errors", "moved"},
    {"outputs"},
    {"config", "data", "rewards"},
    {"parallel"},
    {"models"},
    {"interop", "flow"},
    {"checkpoints"},
    {"rl"},
    {"inference"},
    {"evaluation", "reporting", "pipeline"},
    {"training"},
    {"__init__", "aot", "demo", "train", "infer", "evaluate"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


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
