#!/usr/bin/env bash
# Lints and tests everything, on the CPU and offline. It makes the environment first if none exists. Arguments are passed
# to pytest.
#     bash scripts/test.sh
#     bash scripts/test.sh -m "not slow" tests/data
#     PYTHON=3.13 bash scripts/test.sh    # the newest JAX; tests that need torch are skipped
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
python=$(find_python 3.11 3.12 3.13 python3 python)
environment "$python" test torch metrics packs

export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
# Two files at a time: tests mostly compile, and a compilation uses one core.
"$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
