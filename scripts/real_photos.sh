#!/usr/bin/env bash
# Trains three times on scored photos, from the demo's tiny base: with human scores in the dict format, with the same
# scores in the tensor format, and without scores.
#
#   scripts/real_photos.sh PHOTOS [BASE] [OUTPUT] [SIZE] [STEPS]
#
# PHOTOS: folder with labeled_dict.json, labeled_tensor.json and triplets.json.
# BASE: folder that `python -m ra_jax.demo` made (default: output/demo).
# OUTPUT: folder of the three runs (default: output/photos).
# SIZE: side of a panel in pixels (default: 128).
# STEPS: training steps of each run (default: 200).
set -euo pipefail
photos=${1:?usage: scripts/real_photos.sh PHOTOS [BASE] [OUTPUT] [SIZE] [STEPS]}
base=${2:-output/demo} output=${3:-output/photos} size=${4:-128} steps=${5:-200}
for file in "$photos"/{labeled_dict,labeled_tensor,triplets}.json "$base"/tiny_flux_fill; do
    [ -e "$file" ] || { echo "$file: not found; PHOTOS needs the scored photos, and python -m ra_jax.demo makes BASE" >&2; exit 1; }
done
tiny=(
    --pretrained_model_name_or_path "$base/tiny_flux_fill" --pretrained_redux_model_name_or_path "$base/tiny_redux"
    --aspect_ratio_buckets "$size,$size" --max_sequence_length 4 --mixed_precision no --gradient_checkpointing none
    --lora_rank 8 --lora_alpha 8 --num_inference_steps 12 --validation_steps $((steps / 2)) --num_validation_images 6
    --use_lora --num_experts 3 --train_batch_size 4 --learning_rate 1e-4 --max_train_steps "$steps" --log_freq 10
    --overwrite_output_dir
)
for format in dict tensor; do
    python -m ra_jax.train --train_json_path "$photos/labeled_$format.json" --output_dir "$output/human_$format" \
        --use_grpo --use_human_scores --enable_grpo_rewards --enable_grpo_loss --score_format "$format" \
        --removal_reward_weight 0.4 --background_reward_weight 0.3 --smoothness_reward_weight 0.3 \
        --base_loss_weight 1.0 --policy_loss_weight 0.1 --diversity_loss_weight 0.05 --clip_range 0.2 "${tiny[@]}"
done
python -m ra_jax.train --train_json_path "$photos/triplets.json" --output_dir "$output/standard" "${tiny[@]}"
