#!/usr/bin/env bash
# Lints and tests everything, on the CPU and offline; makes .venv first if need be. Arguments go to pytest:
#     bash scripts/test.sh
#     bash scripts/test.sh -m "not slow" tests/data
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment test torch metrics packs

export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Two files at a time: compiling, most of what tests do, keeps one core busy.
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
