#!/usr/bin/env bash
# Trains on one or several GPUs of this machine. This script has never run on a GPU, because none was available.
#
#   scripts/launch/gpu.sh [--dry_run] [FLAGS of ra_jax.train]
#   GPUS=0 scripts/launch/gpu.sh --config configs/flux_fill_human.toml --train_json_path DATA.json
#   GPUS=0,1,2,3 scripts/launch/gpu.sh --config configs/flux_fill_human.toml --train_json_path DATA.json \
#       --train_batch_size 4 --gradient_accumulation_steps 1
#
# GPUS: numbers of the GPUs to use (default: all in CUDA_VISIBLE_DEVICES, or all of the machine). With several GPUs the
# script adds --mesh_fsdp, unless the flags have --mesh_* or --parallelism. Weights, optimizer and batch are then sharded
# over the GPUs, and train_batch_size must be a multiple of their number.
# --base_precision int8 halves the memory of the base, from 24 GB to 12 GB for 12 B parameters.
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
