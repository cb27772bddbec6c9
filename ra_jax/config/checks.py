"""Checks for contradictions between the settings of a training run.

They run before anything is loaded. Each message names the given value, the expected value and the fix. The range of a
single setting is declared on its field in `ra_jax.config.settings`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec

from ra_jax.config.ranges import out_of_range
from ra_jax.config.settings import ExpertsConfig, GRPOConfig, LossConfig, ParallelConfig, RunConfig, TrainConfig

# With this policy_loss_weight, base_loss_weight 1 and kl_weight 0, the anchor of `rl.strength.policy_weights` is 0.
LEAST_POLICY_WEIGHT = 0.025


def find_problems(config: TrainConfig) -> Iterator[str]:
    """Yield one line for each problem.

    The problems are the settings that are out of range. If there are none, they are the contradictions between
    settings.
    """
    if lines := list(out_of_range(config)):
        yield from lines
        return  # the checks for contradictions assume that every setting is in its range
    yield from _precision_problems(config)
    yield from _mode_problems(config.grpo, config.losses, config.rollouts.reward_functions)
    yield from _policy_problems(config)
    yield from _rollout_problems(config)
    yield from _look_problems(config)
    yield from _drift_problems(config)
    yield from _expert_problems(config.experts)
    yield from _schedule_problems(config)
    yield from _path_problems(config)
    yield from _run_problems(config.run)
    yield from _parallel_problems(config.parallel)
    if config.run.init_experts_from and not config.experts.use_lora:
        yield (
            "init_experts_from without use_lora: no experts are trained; add --use_lora, or remove --init_experts_from"
        )
    trackers = config.logging.report_to
    if "none" in trackers and len(trackers) > 1:
        yield f"report_to = {' '.join(trackers)}: none cannot be combined with trackers; use either none or trackers"
    if "wandb" in trackers and find_spec("wandb") is None:
        yield "report_to = wandb: the package wandb is not installed; run `pip install wandb`, or use tensorboard"


def _precision_problems(config: TrainConfig) -> Iterator[str]:
    if config.model.base_precision == "int8" and not config.experts.use_lora:
        yield (
            "base_precision = int8 without use_lora: without --use_lora the base is trained, and weights in 8 bits "
            "cannot be trained; add --use_lora, or use --base_precision auto"
        )
    if config.model.mixed_precision == "fp16":
        yield (
            "mixed_precision = fp16: not supported, because FLUX overflows in fp16; use --mixed_precision bf16 for "
            "bfloat16 or --mixed_precision no for float32"
        )


def _mode_problems(grpo: GRPOConfig, losses: LossConfig, reward_functions: tuple[str, ...]) -> Iterator[str]:
    if grpo.use_human_scores and not grpo.use_grpo:
        yield (
            "use_human_scores without use_grpo: human scores are used only as rewards of GRPO; add --use_grpo, or "
            "remove --use_human_scores"
        )
    for name in ("enable_grpo_rewards", "enable_grpo_loss"):
        if getattr(grpo, name) and not grpo.use_grpo:
            yield f"{name} without use_grpo: it is a part of GRPO; add --use_grpo, or remove --{name}"
    if losses.base_loss_weighting in ("score", "softmax", "best") and not grpo.use_human_scores:
        yield (
            f"base_loss_weighting = {losses.base_loss_weighting} without use_human_scores: it weighs records by their "
            "human scores; add --use_grpo --use_human_scores, or use --base_loss_weighting none"
        )
    if grpo.kl_weight and not (grpo.use_grpo and grpo.enable_grpo_rewards and grpo.enable_grpo_loss):
        yield (
            f"kl_weight = {grpo.kl_weight} without a policy loss: it keeps the policy close to the base; "
            "add --use_grpo --enable_grpo_rewards --enable_grpo_loss, or remove --kl_weight"
        )
    if grpo.norm_guard_weight and not (grpo.use_grpo and grpo.enable_grpo_rewards and grpo.enable_grpo_loss):
        yield (
            f"norm_guard_weight = {grpo.norm_guard_weight} without a policy loss: it limits the policy's velocities; "
            "add --use_grpo --enable_grpo_rewards --enable_grpo_loss, or remove --norm_guard_weight"
        )
    if not any(grpo.reward_weights) and not reward_functions:
        yield (
            "removal_reward_weight, background_reward_weight and smoothness_reward_weight are all 0: expected at least "
            "one greater than 0"
        )


def _policy_problems(config: TrainConfig) -> Iterator[str]:
    grpo, automatic = config.grpo, config.mode == "automatic"
    if automatic and config.rollouts.num_generations == 1:
        yield (
            "num_generations = 1: the advantage of a rollout compares it with the other rollouts of its condition, and "
            "is 0 without others; expected at least 2 (8 is usual)"
        )
    # "matching" was the default once, and is in the config.toml of every run of that time.
    if grpo.policy_estimator not in ("auto", "matching") and not config.uses_policy:
        yield (
            f"policy_estimator = {grpo.policy_estimator} without a policy loss: add --use_grpo --enable_grpo_rewards "
            "--enable_grpo_loss, or remove --policy_estimator"
        )
    elif grpo.policy_estimator == "sde" and not automatic:
        yield (
            "policy_estimator = sde with human scores: sde needs the sampling steps of an image, which are not known "
            "for the results in the data; use --policy_estimator matching or nft, or use automatic rewards (remove "
            "--use_human_scores)"
        )
    if grpo.policy_strength != "auto" and not config.uses_policy:
        yield (
            f"policy_strength = {grpo.policy_strength} without a policy loss: add --use_grpo --enable_grpo_rewards "
            "--enable_grpo_loss, or remove --policy_strength"
        )
    elif grpo.policy_strength != "auto" and grpo.estimator != "contrast":
        yield (
            f"policy_strength = {grpo.policy_strength} with policy_estimator = {grpo.estimator}: only the estimator "
            "contrast has a strength; remove --policy_strength, or --policy_estimator"
        )
    if config.uses_policy and grpo.estimator == "contrast":
        losses = config.losses
        base_weight = losses.base_loss_weight
        least = LEAST_POLICY_WEIGHT * (base_weight + grpo.kl_weight) / (base_weight or 1.0)
        if losses.policy_loss_weight <= least:
            yield (
                f"policy_loss_weight = {losses.policy_loss_weight:g}: the estimator contrast needs more than "
                f"{least:g}, because base_loss_weight = {losses.base_loss_weight:g} and kl_weight = {grpo.kl_weight:g} "
                "would hold the model back more than policy_strength allows, whatever its value; raise "
                "--policy_loss_weight (0.1 is usual), or remove --enable_grpo_loss"
            )
    contrast = config.uses_policy and grpo.estimator == "contrast"
    if automatic and contrast and config.rollouts.negative_advantages == "drop":
        yield (
            "negative_advantages = drop with the estimator contrast: with advantages whose mean is not 0, the policy's "
            "own rollouts push it on and on; use --negative_advantages keep, or --policy_estimator matching"
        )
    if grpo.policy_estimator == "nft" and grpo.nft_about == "old" and config.uses_policy and not grpo.kl_weight:
        yield (
            "nft_about = old with kl_weight = 0: nothing bounds the sum of the policy's moves, and it drifts away from "
            "natural images; use --kl_weight 0.1 or so, or --nft_about reference"
        )


def _rollout_problems(config: TrainConfig) -> Iterator[str]:
    automatic = config.mode == "automatic"
    if config.experts.routing == "sample":
        if not (automatic and config.uses_policy):
            yield (
                "routing = sample without rollouts: it draws an expert for each rollout; use --use_grpo "
                "--enable_grpo_rewards --enable_grpo_loss without --use_human_scores, or --routing soft, topk, fixed "
                "or uniform"
            )
        elif config.grpo.policy_estimator == "nft":
            yield (
                "routing = sample with policy_estimator = nft: the probability of the drawn expert is a factor of the "
                "policy ratio, and nft has no ratio; use --policy_estimator matching"
            )
    if config.rollouts.reward_functions and not automatic:
        listed = " ".join(config.rollouts.reward_functions)
        yield (
            f"reward_functions = {listed} without generated images: reward functions score generated images; use "
            "--use_grpo --enable_grpo_rewards without --use_human_scores, or remove --reward_functions"
        )
    if automatic and config.losses.base_loss_weight == 0 and config.rollouts.reward_interval > 1:
        yield (
            f"base_loss_weight = 0 with reward_interval = {config.rollouts.reward_interval}: steps without rollouts "
            "would have neither a base loss nor a policy loss; raise --base_loss_weight, or use --reward_interval 1"
        )


def _look_problems(config: TrainConfig) -> Iterator[str]:
    if config.run.patience is None:
        return
    if not config.logging.validation_steps:
        yield (
            f"patience = {config.run.patience} with validation_steps = 0: it counts looks; give --validation_steps, or "
            "remove --patience"
        )
    elif config.data.val_json_path is None and not config.data.validation_split:
        yield (
            f"patience = {config.run.patience} without held-out photos: give --val_json_path or --validation_split, or "
            "remove --patience"
        )


def _drift_problems(config: TrainConfig) -> Iterator[str]:
    if config.run.max_drift is not None and not config.experts.use_lora:
        yield (
            f"max_drift = {config.run.max_drift} without use_lora: drift is measured from the frozen base, but without "
            "--use_lora the base itself is trained; add --use_lora, or remove --max_drift"
        )
    if config.run.max_drift is not None and config.data.val_json_path is None:
        yield (
            "max_drift without val_json_path: drift is measured on held-out clean results; add --val_json_path, or "
            "remove --max_drift"
        )


def _expert_problems(experts: ExpertsConfig) -> Iterator[str]:
    if not experts.use_lora:
        changed = [field.name for field in fields(experts) if getattr(experts, field.name) != field.default]
        if changed:
            flags = " ".join(f"--{name}" for name in changed)
            yield f"{', '.join(changed)} without use_lora: no experts are trained; add --use_lora, or remove {flags}"
        return
    count = experts.num_experts
    for name in ("expert_names", "fixed_expert_weights"):
        values = getattr(experts, name)
        if values and len(values) != count:
            listed = " ".join(map(str, values))
            yield f"num_experts = {count}, but {name} has {len(values)} values ({listed}): expected one per expert"
    if len(set(experts.expert_names)) < len(experts.expert_names):
        yield f"expert_names = {' '.join(experts.expert_names)}: expected distinct names"
    yield from _gate_problems(experts)
    try:
        re.compile(experts.target_modules or "")
    except re.error as error:
        yield f"target_modules = {experts.target_modules}: not a regular expression: {error}"


def _gate_problems(experts: ExpertsConfig) -> Iterator[str]:
    count, floor = experts.num_experts, experts.router_floor
    listed = " ".join(map(str, experts.weights))
    if not math.isclose(sum(experts.weights), 1, abs_tol=1e-6):
        yield f"fixed_expert_weights = {listed}: their sum is {sum(experts.weights):g}; expected 1"
    if count * floor >= 1:
        yield (
            f"router_floor = {floor}: {count} experts cannot all have a gate greater than {floor}, because the sum of "
            f"the gates is 1; expected less than 1/{count}"
        )
    elif experts.routing in ("soft", "topk", "sample") and min(experts.weights) <= floor:
        yield (
            f"fixed_expert_weights = {listed}: {experts.routing} routing starts with these gates, and all gates must "
            f"be greater than router_floor = {floor}; raise the smallest weight, or lower --router_floor"
        )


def _schedule_problems(config: TrainConfig) -> Iterator[str]:
    warmup, steps = config.optimization.lr_warmup_steps, config.run.max_train_steps
    if steps is not None and warmup > steps:
        yield (
            f"lr_warmup_steps = {warmup}: longer than max_train_steps = {steps}; lower --lr_warmup_steps, or "
            "train longer"
        )
    if config.optimization.lr_scheduler == "constant" and warmup:
        yield (
            f"lr_warmup_steps = {warmup}: lr_scheduler constant has no warm-up; use --lr_scheduler constant_with_warmup"
        )


def _parallel_problems(parallel: ParallelConfig) -> Iterator[str]:
    names = ("coordinator_address", "num_processes", "process_id")
    present = [name for name in names if getattr(parallel, name) is not None]
    missing = [name for name in names if name not in present]
    if present and missing:
        yield (
            f"{' and '.join(present)} without {' and '.join(missing)}: give --coordinator_address, --num_processes and "
            "--process_id together"
        )
    elif present and parallel.process_id >= parallel.num_processes:
        last = parallel.num_processes - 1
        yield f"process_id = {parallel.process_id}: expected 0 to {last} with num_processes = {parallel.num_processes}"
    elif present:
        address = re.fullmatch(r"(\[[^]/]+\]|[^:/]+):(\d+)", parallel.coordinator_address)
        if not address or not 1 <= int(address[2]) <= 65535:
            yield (
                f"coordinator_address = {parallel.coordinator_address}: expected HOST:PORT with a port from 1 to "
                "65535, such as 10.0.0.2:12345"
            )


def _path_problems(config: TrainConfig) -> Iterator[str]:
    paths = {name: getattr(config.data, name) for name in ("train_json_path", "val_json_path")}
    paths |= {name: getattr(config.run, name) for name in ("output_dir", "resume_from_checkpoint", "init_experts_from")}
    for name, path in paths.items():
        if "://" in (path or ""):
            yield (
                f"{name} = {path}: URLs are not supported; mount the bucket (by Cloud Storage FUSE, Filestore or NFS) "
                "and give the path of the mounted folder or file"
            )


def _run_problems(run: RunConfig) -> Iterator[str]:
    if run.resume_from_checkpoint not in (None, "latest") and run.init_experts_from:
        yield (
            f"resume_from_checkpoint = {run.resume_from_checkpoint} with init_experts_from: the first continues a run, "
            "the second starts a new one; give only one of them"
        )
    if run.resume_from_checkpoint and run.overwrite_output_dir:
        yield (
            "resume_from_checkpoint with overwrite_output_dir: the first continues the run in output_dir, the second "
            "deletes it; give only one of them"
        )
