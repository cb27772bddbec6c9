#!/usr/bin/env bash
# Trains on the GPUs of this machine: one, or several that share out the weights. Never run: no GPU was
# at hand for it.
#
#   scripts/launch/gpu.sh [--dry_run] [FLAGS of ra_jax.train]
#   GPUS=0 scripts/launch/gpu.sh --config configs/flux_fill_human.toml --train_json_path DATA.json
#   GPUS=0,1,2,3 scripts/launch/gpu.sh --config configs/flux_fill_human.toml --train_json_path DATA.json \
#       --train_batch_size 4 --gradient_accumulation_steps 1
#
# GPUS: which ones (default: all that CUDA_VISIBLE_DEVICES allows). With several, weights, optimizer and batch are shared
# out over them (--mesh_fsdp), unless the flags say how; train_batch_size must then be a multiple of their number.
# --base_precision int8 halves the base's memory, from 24 GB to 12 GB for 12 B parameters.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/launch/common.sh
read_options "$@" && set -- "${rest[@]}"
[ $# -gt 0 ] || { usage >&2 && exit 2; }
use_environment scripts/launch/gpu.env
if [ -n "${GPUS:-}" ]; then
    export CUDA_VISIBLE_DEVICES=$GPUS
    [ -z "$dry_run" ] || printf 'export CUDA_VISIBLE_DEVICES=%q\n' "$GPUS"
fi
visible=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}
count=$(tr ',' '\n' <<<"${visible:-0}" | grep -c .)
mesh=()
[[ $count -eq 1 || "$*" == *--mesh_* || "$*" == *--parallelism* ]] || mesh=(--mesh_fsdp "$count")
run python -m ra_jax.train "$@" "${mesh[@]}"
