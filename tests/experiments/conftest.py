"""Access to the modules of scripts/experiments."""

import importlib
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "scripts" / "experiments"


@pytest.fixture(scope="module")
def load_experiment():
    """load_experiment(name) -> the module of a script, imported as the scripts import held_out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        yield importlib.import_module
    for path in EXPERIMENTS.glob("*.py"):
        sys.modules.pop(path.stem, None)
