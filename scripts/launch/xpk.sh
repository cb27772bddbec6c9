#!/usr/bin/env bash
# Trains on a GKE cluster with TPUs by XPK, in a container of scripts/launch/Dockerfile. Never run: no cluster was at hand.
#
#   CLUSTER=NAME ZONE=us-east5-b TPU_TYPE=v5litepod-16 IMAGE=REGISTRY/ra_jax scripts/launch/xpk.sh [--dry_run] [FLAGS]
#
# IMAGE: a name that the cluster can pull; it is built and pushed first. WORKLOAD: the job's name (default: ra-jax);
# SLICES: how many (default 1). XPK is the package xpk. --output_dir and the data must be on storage that all pods see.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/launch/common.sh
read_options "$@" && set -- "${rest[@]}"
need CLUSTER ZONE TPU_TYPE IMAGE
[ $# -gt 0 ] || { usage >&2 && exit 2; }
run docker build --file scripts/launch/Dockerfile --tag "$IMAGE" .
run docker push "$IMAGE"
run xpk workload create --cluster "$CLUSTER" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --tpu-type "$TPU_TYPE" \
    --num-slices "${SLICES:-1}" --workload "${WORKLOAD:-ra-jax}" --docker-image "$IMAGE" \
    --command "set -a && source scripts/launch/tpu.env && set +a && python -m ra_jax.train$(printf ' %q' "$@")"
