#!/usr/bin/env bash
# Requests a TPU slice as a queued resource, waits for it, trains with tpu_pod.sh, and deletes it at the end. This script
# has never run on a TPU, because none was available.
#
#   TPU=NAME ZONE=us-east5-b TYPE=v5litepod-16 scripts/launch/tpu_queued.sh [--dry_run] [FLAGS of ra_jax.train]
#
# TPU: name of the slice to create.
# ZONE: its zone.
# TYPE: its type, such as v5litepod-16 (v5e:4x4), v5p-8 (v5p:2x2x1) or v6e-8 (v6e:2x4). `python -m ra_jax.aot` prints the
# memory and time that a step needs on it.
# PROJECT: project of Google Cloud (default: that of gcloud's configuration).
# RUNTIME: image of the machines (default: depends on TYPE).
# SPOT=yes: a cheaper slice that Google may take back. Then start again with --resume_from_checkpoint latest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/launch/common.sh
read_options "$@" && set -- "${rest[@]}"
require_variables TPU ZONE TYPE
[ $# -gt 0 ] || { usage >&2 && exit 2; }
case $TYPE in
    v5lite*) image=v2-alpha-tpuv5-lite ;;
    v5p*) image=v2-alpha-tpuv5 ;;
    v6e*) image=v2-alpha-tpuv6e ;;
    *) image=tpu-ubuntu2204-base ;;
esac
location=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
options=()
[ -z "$dry_run" ] || options=(--dry_run)
run gcloud compute tpus queued-resources create "$TPU-queue" --node-id "$TPU" --accelerator-type "$TYPE" \
    --runtime-version "${RUNTIME:-$image}" "${location[@]}" ${SPOT:+--spot}
if [ -z "$dry_run" ]; then
    trap 'gcloud compute tpus queued-resources delete "$TPU-queue" --force --quiet "${location[@]}"' EXIT
    until state=$(gcloud compute tpus queued-resources describe "$TPU-queue" "${location[@]}" --format='value(state.state)') &&
        [ "$state" = ACTIVE ]; do
        [[ $state != FAILED && $state != SUSPEND* ]] || { echo "$TPU-queue: the queued resource is $state" >&2 && exit 1; }
        sleep 30
    done
fi
scripts/launch/tpu_pod.sh "${options[@]}" setup
scripts/launch/tpu_pod.sh "${options[@]}" train "$@"
[ -z "$dry_run" ] || run gcloud compute tpus queued-resources delete "$TPU-queue" --force --quiet "${location[@]}"
