#!/usr/bin/env bash
# Trains on an existing TPU pod slice, by ssh to all its hosts. This script has never run on a TPU, because none was
# available.
#
#   TPU=NAME ZONE=us-east5-b scripts/launch/tpu_pod.sh [--dry_run] setup             copies the project, installs it
#   TPU=NAME ZONE=us-east5-b scripts/launch/tpu_pod.sh [--dry_run] train [FLAGS of ra_jax.train]
#
# TPU: name of the slice.
# ZONE: its zone.
# PROJECT: project of Google Cloud (default: that of gcloud's configuration).
#
# --output_dir must be on storage that all hosts share, such as a mounted bucket (Cloud Storage FUSE) or Filestore. The
# data must be there too, or each host must have the same copy at the same path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/launch/common.sh
read_options "$@" && set -- "${rest[@]}"
require_variables TPU ZONE
location=("$TPU" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
case ${1:-} in
    setup)
        run git archive --format tar.gz --output /tmp/ra_jax.tar.gz HEAD
        run gcloud compute tpus tpu-vm scp /tmp/ra_jax.tar.gz "$TPU:" --worker=all "${location[@]:1}"
        run gcloud compute tpus tpu-vm ssh "${location[@]}" --worker=all --command \
            "mkdir -p ra_jax && tar -xzf ra_jax.tar.gz -C ra_jax && cd ra_jax && python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[tpu,packs]'"
        ;;
    train)
        shift
        [ $# -gt 0 ] || { usage >&2 && exit 2; }
        run gcloud compute tpus tpu-vm ssh "${location[@]}" --worker=all --command \
            "cd ra_jax && set -a && source scripts/launch/tpu.env && set +a && .venv/bin/python -m ra_jax.train$(printf ' %q' "$@")"
        ;;
    *) usage >&2 && exit 2 ;;
esac
