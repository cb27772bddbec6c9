#!/usr/bin/env bash
# Trains on a GKE cluster with TPUs, in a container of scripts/launch/Dockerfile. It needs XPK (the Python package xpk).
# This script has never run, because no cluster was available.
#
#   CLUSTER=NAME ZONE=us-east5-b TPU_TYPE=v5litepod-16 IMAGE=REGISTRY/ra_jax scripts/launch/xpk.sh [--dry_run] [FLAGS]
#
# CLUSTER: name of the cluster.
# ZONE: its zone.
# TPU_TYPE: type of a slice.
# IMAGE: name of the container image, in a registry that the cluster can pull from. The script builds and pushes it first.
# WORKLOAD: name of the job (default: ra-jax).
# SLICES: number of slices (default: 1).
# PROJECT: project of Google Cloud (default: that of gcloud's configuration).
#
# --output_dir and the data must be on storage that all pods share.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/launch/common.sh
read_options "$@" && set -- "${rest[@]}"
require_variables CLUSTER ZONE TPU_TYPE IMAGE
[ $# -gt 0 ] || { usage >&2 && exit 2; }
run docker build --file scripts/launch/Dockerfile --tag "$IMAGE" .
run docker push "$IMAGE"
run xpk workload create --cluster "$CLUSTER" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --tpu-type "$TPU_TYPE" \
    --num-slices "${SLICES:-1}" --workload "${WORKLOAD:-ra-jax}" --docker-image "$IMAGE" \
    --command "set -a && source scripts/launch/tpu.env && set +a && python -m ra_jax.train$(printf ' %q' "$@")"
