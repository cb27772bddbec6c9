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


def find_problems(config: TrainConfig) -> Iterator[str]:
    """Yield a line for each setting out of range, or if there are none, for each contradiction between settings."""
    if lines := list(out_of_range(config)):
        yield from lines
        return  # the checks for contradictions assume that every setting is in its range
    yield from _not_available(config)
    yield from _mode(config.grpo, config.losses, config.rollouts.reward_functions)
    yield from _automatic(config)
    yield from _experts(config.experts)
    if config.grpo.kl_weight and not config.experts.use_lora:
        yield f"kl_weight = {config.grpo.kl_weight} without use_lora: the base it is measured to is itself trained"
    yield from _schedule(config)
    yield from _places(config)
    yield from _run(config.run)
    yield from _parallel(config.parallel)
    if config.run.init_experts_from and not config.experts.use_lora:
        yield "init_experts_from without use_lora: there are no experts to begin with; add --use_lora, or leave it out"
    trackers = config.logging.report_to
    if "none" in trackers and len(trackers) > 1:
        yield f"report_to = {' '.join(trackers)}: expected none alone, or trackers without none"
    if "wandb" in trackers and find_spec("wandb") is None:
        yield "report_to = wandb: the package wandb is not installed; `pip install wandb`, or report to tensorboard"


def _not_available(config: TrainConfig) -> Iterator[str]:
    if config.model.base_precision == "int8" and not config.experts.use_lora:
        yield "base_precision = int8 without use_lora: the base is trained then, and 8 bits cannot be; use auto"
    if config.model.mixed_precision == "fp16":
        yield "mixed_precision = fp16: not supported, FLUX overflows it; use bf16, or no for float32"


def _mode(grpo: GRPOConfig, losses: LossConfig, reward_functions: tuple[str, ...]) -> Iterator[str]:
    if grpo.use_human_scores and not grpo.use_grpo:
        yield "use_human_scores without use_grpo: scores are GRPO's rewards; add --use_grpo, or leave it out"
    for name in ("enable_grpo_rewards", "enable_grpo_loss"):
        if getattr(grpo, name) and not grpo.use_grpo:
            yield f"{name} without use_grpo: it is a part of GRPO; add --use_grpo, or leave --{name} out"
    if losses.base_loss_weighting in ("score", "softmax", "best") and not grpo.use_human_scores:
        yield (
            f"base_loss_weighting = {losses.base_loss_weighting}: weighs records by their scores, which only "
            "--use_grpo --use_human_scores reads; add them, or use none"
        )
    if grpo.kl_weight and not (grpo.use_grpo and grpo.enable_grpo_rewards and grpo.enable_grpo_loss):
        yield (
            f"kl_weight = {grpo.kl_weight}: holds the policy to the base, and there is no policy term; add --use_grpo "
            "--enable_grpo_rewards --enable_grpo_loss, or leave it out"
        )
    if not any(grpo.reward_weights) and not reward_functions:
        yield "removal, background and smoothness_reward_weight are all 0: expected one greater than 0"


def _automatic(config: TrainConfig) -> Iterator[str]:
    """Yield the contradictions of settings for automatic rewards, policy estimators and max_drift."""
    grpo, automatic = config.grpo, config.mode == "automatic"
    if automatic and config.rollouts.num_generations == 1:
        yield (
            "num_generations = 1: a rollout is judged against the others of its condition, and alone it teaches "
            "nothing; expected at least 2 (8 is usual)"
        )
    if grpo.policy_estimator != "matching" and not config.uses_policy:
        yield (
            f"policy_estimator = {grpo.policy_estimator}: there is no policy term; add --use_grpo "
            "--enable_grpo_rewards --enable_grpo_loss, or leave it out"
        )
    elif grpo.policy_estimator == "sde" and not automatic:
        yield (
            "policy_estimator = sde: judges the steps by which an image was generated, which a stored result does not "
            "have; use matching or nft, or automatic rewards (--use_grpo --enable_grpo_rewards without "
            "--use_human_scores)"
        )
    if grpo.policy_estimator == "nft" and config.uses_policy and not grpo.kl_weight:
        yield (
            "policy_estimator = nft with kl_weight = 0: drifts off what images look like; give --kl_weight 0.1 or so, "
            "or use matching"
        )
    if grpo.policy_temperature == "auto" and config.uses_policy:
        if grpo.policy_estimator != "matching":
            name = grpo.policy_estimator
            yield f"policy_temperature = auto: policy_estimator {name} has no temperature; leave it out"
        elif (config.rollouts.num_iterations if automatic else grpo.policy_sync_steps) == 1:
            name = "num_iterations" if automatic else "policy_sync_steps"
            yield (
                f"policy_temperature = auto with {name} = 1: nothing is ever clipped then, and the temperature would "
                f"fall for ever; raise {name}, or give a number"
            )
    if config.experts.routing == "sample":
        if not (automatic and config.uses_policy):
            yield (
                "routing = sample: draws an expert for each rollout, and there are none without --use_grpo "
                "--enable_grpo_rewards --enable_grpo_loss, or with --use_human_scores; use soft, topk, fixed or uniform"
            )
        elif grpo.policy_estimator == "nft":
            yield "routing = sample with policy_estimator = nft: nft has no ratio that a draw could join; use matching"
    if config.rollouts.reward_functions and not automatic:
        given = " ".join(config.rollouts.reward_functions)
        yield (
            f"reward_functions = {given}: judge generated images, and nothing is generated without --use_grpo "
            "--enable_grpo_rewards, or with --use_human_scores; leave them out"
        )
    if automatic and config.losses.base_loss_weight == 0 and config.rollouts.reward_interval > 1:
        yield (
            f"base_loss_weight = 0 with reward_interval = {config.rollouts.reward_interval}: steps without rollouts "
            "would have nothing to learn from; give a base_loss_weight, or rollouts at every step"
        )
    if config.run.max_drift is not None and not config.experts.use_lora:
        yield f"max_drift = {config.run.max_drift} without use_lora: the base it is measured from is itself trained"
    if config.run.max_drift is not None and config.data.val_json_path is None:
        yield "max_drift without val_json_path: drift is measured on held-out clean results; name some, or leave it out"


def _experts(experts: ExpertsConfig) -> Iterator[str]:
    if not experts.use_lora:
        given = [field.name for field in fields(experts) if getattr(experts, field.name) != field.default]
        if given:
            names = ", ".join(given)
            yield f"{names} without use_lora: no experts are trained then; add --use_lora, or leave them out"
        return
    count = experts.num_experts
    for name in ("expert_names", "fixed_expert_weights"):
        values = getattr(experts, name)
        if values and len(values) != count:
            listed = " ".join(map(str, values))
            yield f"num_experts = {count}, but {name} has {len(values)} ({listed}): expected one for each"
    if len(set(experts.expert_names)) < len(experts.expert_names):
        yield f"expert_names = {' '.join(experts.expert_names)}: expected names that differ"
    yield from _gates(experts)
    try:
        re.compile(experts.target_modules or "")
    except re.error as error:
        yield f"target_modules = {experts.target_modules}: not a regular expression: {error}"


def _gates(experts: ExpertsConfig) -> Iterator[str]:
    count, floor = experts.num_experts, experts.router_floor
    listed = " ".join(map(str, experts.weights))
    if not math.isclose(sum(experts.weights), 1, abs_tol=1e-6):
        yield f"fixed_expert_weights = {listed}: they sum to {sum(experts.weights):g}; expected a sum of 1"
    if count * floor >= 1:
        yield (
            f"router_floor = {floor}: {count} experts of at least {floor} each leave the router no choice; "
            f"expected less than 1/{count}"
        )
    elif experts.routing in ("soft", "topk", "sample") and min(experts.weights) <= floor:
        yield (
            f"fixed_expert_weights = {listed}: {experts.routing} routing starts from them and keeps gates "
            f"above router_floor = {floor}; raise the smallest weight, or lower the floor"
        )


def _schedule(config: TrainConfig) -> Iterator[str]:
    warmup, steps = config.optimization.lr_warmup_steps, config.run.max_train_steps
    if steps is not None and warmup > steps:
        yield f"lr_warmup_steps = {warmup}: longer than max_train_steps = {steps}; lower it, or train longer"
    if config.optimization.lr_scheduler == "constant" and warmup:
        yield f"lr_warmup_steps = {warmup}: lr_scheduler constant has no warm-up; use constant_with_warmup"


def _parallel(parallel: ParallelConfig) -> Iterator[str]:
    together = ("coordinator_address", "num_processes", "process_id")
    given = [name for name in together if getattr(parallel, name) is not None]
    if given and len(given) < len(together):
        yield f"{' and '.join(given)} without the rest: give --coordinator_address, --num_processes and --process_id"
    elif given and parallel.process_id >= parallel.num_processes:
        last = parallel.num_processes - 1
        yield f"process_id = {parallel.process_id}: expected 0 to {last} with num_processes = {parallel.num_processes}"
    elif given:
        told = re.fullmatch(r"(\[[^]/]+\]|[^:/]+):(\d+)", parallel.coordinator_address)
        if not told or not 1 <= int(told[2]) <= 65535:
            yield (
                f"coordinator_address = {parallel.coordinator_address}: expected HOST:PORT with a port from 1 to "
                "65535, such as 10.0.0.2:12345"
            )


def _places(config: TrainConfig) -> Iterator[str]:
    places = {name: getattr(config.data, name) for name in ("train_json_path", "val_json_path")}
    places |= {
        name: getattr(config.run, name) for name in ("output_dir", "resume_from_checkpoint", "init_experts_from")
    }
    for name, place in places.items():
        if "://" in (place or ""):
            yield (
                f"{name} = {place}: only folders and files are read and written; mount the bucket (Cloud Storage FUSE, "
                "Filestore, NFS) and give its path"
            )


def _run(run: RunConfig) -> Iterator[str]:
    if run.resume_from_checkpoint and run.init_experts_from:
        yield (
            "resume_from_checkpoint with init_experts_from: one goes on with a run, the other begins a new one; give "
            "one of them"
        )
    if run.resume_from_checkpoint and run.overwrite_output_dir:
        yield (
            "resume_from_checkpoint with overwrite_output_dir: one continues the run in output_dir, the "
            "other deletes it; give one of them"
        )
