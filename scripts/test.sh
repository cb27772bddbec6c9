#!/usr/bin/env bash
# Lints and tests everything, on the CPU and offline; makes the environment first if need be. Arguments go to pytest:
#     bash scripts/test.sh
#     bash scripts/test.sh -m "not slow" tests/data
#     PYTHON=3.13 bash scripts/test.sh    # the newest JAX; what needs torch is skipped
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
python=$(find_python 3.11 3.12 3.13 python3 python)
environment "$python" test torch metrics packs

export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
# Two files at a time: compiling, most of what tests do, keeps one core busy.
"$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
