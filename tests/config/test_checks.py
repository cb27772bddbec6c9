"""Contradictions between settings, and the message for each."""

import pytest

from ra_jax.config.parse import parse
from ra_jax.errors import ConfigError

PATHS = ["--train_json_path", "data.json", "--output_dir", "out"]
GRPO = ["--use_grpo", "--use_human_scores", "--enable_grpo_rewards", "--enable_grpo_loss"]
HUMAN = [*PATHS, *GRPO, "--use_lora"]
AUTOMATIC = ["--use_grpo", "--enable_grpo_rewards", "--enable_grpo_loss"]

CONTRADICTIONS = [
    (["--use_lora", "--num_experts", "2", "--expert_names", "a", "b", "c"], "expert_names has 3 values (a b c)"),
    (
        ["--use_lora", "--num_experts", "2", "--fixed_expert_weights", "0.4", "0.3", "0.3"],
        "fixed_expert_weights has 3 values",
    ),
    (["--use_lora", "--expert_names", "a", "b", "a"], "expected distinct names"),
    (["--use_lora", "--fixed_expert_weights", "0.5", "0.3", "0.3"], "their sum is 1.1"),
    (["--use_lora", "--fixed_expert_weights", "0.02", "0.49", "0.49"], "router_floor = 0.05"),
    (["--use_lora", "--num_experts", "20"], "router_floor = 0.05: 20 experts"),
    (["--use_lora", "--routing", "sample"], "routing = sample"),
    (["--use_lora", "--target_modules", "("], "not a regular expression"),
    (["--lora_rank", "8"], "lora_rank without use_lora"),
    (["--use_human_scores"], "use_human_scores without use_grpo"),
    (["--enable_grpo_loss"], "enable_grpo_loss without use_grpo"),
    (
        ["--base_loss_weighting", "best"],
        "base_loss_weighting = best without use_human_scores",
    ),
    (["--policy_estimator", "nft"], "policy_estimator = nft without a policy loss"),
    ([*GRPO, "--policy_estimator", "sde"], "policy_estimator = sde with human scores: sde needs the sampling steps"),
    ([*GRPO, "--policy_estimator", "nft", "--nft_about", "old"], "nft_about = old with kl_weight = 0"),
    ([*AUTOMATIC, "--num_generations", "1"], "num_generations = 1: the advantage of a rollout"),
    (["--use_lora", *GRPO, "--routing", "sample"], "routing = sample without rollouts"),
    (
        ["--use_lora", *AUTOMATIC, "--routing", "sample", "--policy_estimator", "nft", "--kl_weight", "0.1"],
        "nft has no ratio",
    ),
    ([*GRPO, "--reward_functions", "lpips"], "reward_functions = lpips without generated images"),
    (["--use_lora", "--max_drift", "0.05"], "max_drift without val_json_path"),
    (["--max_drift", "0.05", "--val_json_path", "v.json"], "max_drift = 0.05 without use_lora"),
    (
        [*GRPO, "--policy_loss_weight", "0.025"],
        "policy_loss_weight = 0.025: the estimator contrast needs more than 0.025",
    ),
    ([*GRPO, "--policy_loss_weight", "0.05", "--kl_weight", "3"], "contrast needs more than 0.1,"),
    (
        [*GRPO, "--policy_strength", "3", "--policy_estimator", "matching"],
        "policy_strength = 3.0 with policy_estimator",
    ),
    (["--policy_strength", "3"], "policy_strength = 3.0 without a policy loss"),
    (["--patience", "2", "--validation_steps", "0"], "patience = 2 with validation_steps = 0: it counts looks"),
    (
        ["--patience", "2", "--validation_split", "0"],
        "patience = 2 without held-out photos",
    ),
    ([*AUTOMATIC, "--base_loss_weight", "0", "--reward_interval", "2"], "steps without rollouts would have neither"),
    (["--mixed_precision", "fp16"], "FLUX overflows in fp16; use --mixed_precision bf16"),
    (
        ["--lr_scheduler", "cosine", "--lr_warmup_steps", "11", "--max_train_steps", "10"],
        "lr_warmup_steps = 11",
    ),
    (["--lr_warmup_steps", "5"], "lr_scheduler constant has no warm-up"),
    (["--resume_from_checkpoint", "latest", "--overwrite_output_dir"], "give only one of them"),
    (
        ["--use_lora", "--resume_from_checkpoint", "run/checkpoints/4", "--init_experts_from", "run"],
        "resume_from_checkpoint = run/checkpoints/4 with init_experts_from",
    ),
    (["--init_experts_from", "run"], "init_experts_from without use_lora"),
    (["--base_precision", "int8"], "base_precision = int8 without use_lora"),
    (["--report_to", "none", "tensorboard"], "none cannot be combined with trackers"),
    (["--kl_weight", "0.5"], "kl_weight = 0.5 without a policy loss"),
    (["--norm_guard_weight", "0.5"], "norm_guard_weight = 0.5 without a policy loss"),
    ([*AUTOMATIC, "--negative_advantages", "drop"], "negative_advantages = drop with the estimator contrast"),
    (["--num_processes", "2"], "num_processes without coordinator_address and process_id: give --coordinator_address"),
    (
        ["--coordinator_address", "a:1", "--num_processes", "2", "--process_id", "2"],
        "process_id = 2: expected 0 to 1 with num_processes = 2",
    ),
    (
        ["--val_json_path", "gs://bucket/held_out.json"],
        "val_json_path = gs://bucket/held_out.json: URLs are not supported",
    ),
    (
        ["--coordinator_address", "localhost", "--num_processes", "2", "--process_id", "0"],
        "coordinator_address = localhost: expected HOST:PORT",
    ),
    (
        ["--coordinator_address", "http://localhost:1234", "--num_processes", "2", "--process_id", "0"],
        "coordinator_address = http://localhost:1234: expected HOST:PORT",
    ),
    (
        ["--coordinator_address", "localhost:99999", "--num_processes", "2", "--process_id", "0"],
        "coordinator_address = localhost:99999: expected HOST:PORT with a port from 1 to 65535",
    ),
    (
        [f"--{score}_reward_weight=0" for score in ("removal", "background", "smoothness")],
        "all 0",
    ),
]


@pytest.mark.parametrize(("flags", "expected"), CONTRADICTIONS, ids=[" ".join(flags) for flags, _ in CONTRADICTIONS])
def test_contradictions_are_refused(flags, expected, catch_parse_error):
    assert expected in catch_parse_error([*PATHS, *flags])


def test_all_contradictions_are_reported_together(catch_parse_error):
    message = catch_parse_error([*PATHS, "--use_human_scores", "--mixed_precision", "fp16", "--lora_rank", "8"])
    assert len(message.splitlines()) == 3


def test_a_missing_wandb_is_reported_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("ra_jax.config.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        parse([*HUMAN, "--report_to", "wandb"])
