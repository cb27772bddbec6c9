#!/usr/bin/env bash
# The main job on the embedded default, within 10 minutes on 2 cores: makes .venv, synthetic scored scenes and a tiny
# FLUX-Fill if need be, then trains experts on the scores. Arguments go to the training:
#     bash scripts/demo.sh
#     bash scripts/demo.sh --max_train_steps 40
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment

.venv/bin/python -m ra_jax.demo
.venv/bin/python -m ra_jax.train --config configs/tiny.toml --overwrite_output_dir "$@"
