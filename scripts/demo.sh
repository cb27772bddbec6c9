#!/usr/bin/env bash
# Runs the whole job on a tiny model and synthetic scenes. It should take less than 10 minutes on 2 cores.
#
#     bash scripts/demo.sh
#     bash scripts/demo.sh --learning_rate 1e-3
#
# It makes an environment if none exists, with the newest Python that constraints.txt pins. Then it makes scored scenes
# and a tiny FLUX-Fill model, unless they exist. It trains experts on the scores, and removes objects from held-out
# scenes. Arguments are passed to the training. The training writes to output/tiny_grpo and replaces an earlier run there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
python=$(find_python 3.13 3.12 3.11 python3 python)
environment "$python"

held_out=output/demo/data/held_out
run=output/tiny_grpo
removals=output/tiny_removals

echo "1/3 scenes and base"
"$venv/bin/python" -m ra_jax.demo
echo "2/3 training"
"$venv/bin/python" -m ra_jax.train --config configs/tiny.toml --overwrite_output_dir "$@" --output_dir "$run"
echo "3/3 removal"
"$venv/bin/python" -m ra_jax.infer --source_image "$held_out/triplets.json" --experts "$run" \
    --num_inference_steps 12 --overwrite --output_dir "$removals"

cat <<END

Done. Results:
  $run/previews/    source | mask | result | ground truth, at step 0 (the base alone) and later steps
  $run/curves.png   losses, ratio, clipping, experts, drift; the numbers are in $run/metrics.jsonl
  $removals/        removals of held-out scenes (sources: $held_out/input, ground truth: $held_out/gt)

Before you run other commands, activate the environment: source $venv/bin/activate
END
