"""Properties of the settings: mode, experts, weights and length of a run."""

import dataclasses

import pytest

from ra_jax.config.parse import parse, to_flat_dict
from ra_jax.config.settings import DEFAULT_REWARD_WEIGHTS, ExpertsConfig, GRPOConfig, RolloutConfig
from ra_jax.errors import ConfigError

PATHS = ["--train_json_path", "data.json", "--output_dir", "out"]
GRPO = ["--use_grpo", "--use_human_scores", "--enable_grpo_rewards", "--enable_grpo_loss"]
HUMAN = [*PATHS, *GRPO, "--use_lora"]
AUTOMATIC = ["--use_grpo", "--enable_grpo_rewards", "--enable_grpo_loss"]

GUIDE_HUMAN = """
    --train_json_path /path/to/labeled_data.json --output_dir ./output/grpo_human_labels --use_grpo
    --use_human_scores --enable_grpo_rewards --enable_grpo_loss --score_format dict --use_lora
    --num_experts 3 --removal_reward_weight 0.4 --background_reward_weight 0.3 --smoothness_reward_weight 0.3
    --base_loss_weight 1.0 --policy_loss_weight 0.1 --diversity_loss_weight 0.05 --clip_range 0.2
    --train_batch_size 4 --learning_rate 1e-4 --max_train_steps 10000
"""
GUIDE_STANDARD = """
    --train_json_path /path/to/standard_data.json --output_dir ./output/moe_standard --use_lora
    --num_experts 3 --train_batch_size 4 --learning_rate 1e-4 --max_train_steps 10000
"""


def test_the_guides_human_command():
    config = parse(GUIDE_HUMAN.split())
    assert config.mode == "human"
    assert config.uses_policy
    assert config.base_loss_weighting == "score"
    assert config.grpo.reward_weights == (0.4, 0.3, 0.3)
    assert config.run.max_train_steps == 10000
    # All other values of the guide's command are the defaults.
    assert parse([*HUMAN, "--max_train_steps", "10000"]) == dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train_json_path="data.json"),
        run=dataclasses.replace(config.run, output_dir="out"),
    )


def test_the_guides_standard_command():
    config = parse(GUIDE_STANDARD.split())
    assert config.mode == "standard"
    assert not config.uses_policy
    assert config.base_loss_weighting == "none"
    assert config.experts.names == ("removal", "background", "smoothness")
    assert config.experts.weights == (0.4, 0.3, 0.3)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (HUMAN, True),
        ([*HUMAN, "--policy_sync_steps", "1"], False),  # the old policy is always the current one
        ([*HUMAN, "--policy_temperature", "0.3"], False),
        ([*HUMAN, "--policy_estimator", "matching"], True),
        ([*HUMAN, "--policy_estimator", "nft"], False),  # no ratio
        ([*PATHS, *AUTOMATIC], True),
        ([*PATHS, *AUTOMATIC, "--num_iterations", "1"], False),
    ],
)
def test_the_temperature_adapts_where_ratios_can_be_clipped(flags, expected):
    assert parse(flags).adapts_temperature == expected


def test_modes():
    assert parse([*PATHS, "--use_grpo"]).mode == "standard"  # without --enable_grpo_rewards there are no rewards
    automatic = parse([*PATHS, *AUTOMATIC])
    assert (automatic.mode, automatic.uses_policy, automatic.updates) == ("automatic", True, 2)
    assert automatic.base_loss_weighting == "none"
    assert parse([*PATHS, *AUTOMATIC[:2]]).mode == "automatic"
    assert parse(HUMAN).updates == 1


def test_the_default_weights_are_defined_once():
    assert DEFAULT_REWARD_WEIGHTS == (0.4, 0.3, 0.3)
    assert GRPOConfig().reward_weights == ExpertsConfig().weights == DEFAULT_REWARD_WEIGHTS


def test_experts_other_than_three_start_uniform():
    config = parse([*PATHS, "--use_lora", "--num_experts", "4"])
    assert config.experts.weights == (0.25,) * 4
    assert config.experts.names == ("expert_0", "expert_1", "expert_2", "expert_3")


def test_names_and_weights_override_the_defaults():
    experts = ExpertsConfig(expert_names=("a", "b", "c"), fixed_expert_weights=(0.2, 0.2, 0.6))
    assert (experts.names, experts.weights) == (("a", "b", "c"), (0.2, 0.2, 0.6))
    assert parse([*HUMAN, "--base_loss_weighting", "best"]).base_loss_weighting == "best"


@pytest.mark.parametrize(
    ("setting", "estimator", "drops"),
    [("drop", "nft", True), ("keep", "matching", False), ("auto", "matching", True), ("auto", "sde", False)],
)
def test_negative_advantages(setting, estimator, drops):
    assert RolloutConfig(negative_advantages=setting).drops_negative(estimator) is drops


def test_rollouts_are_due_from_the_first_step():
    assert [step for step in range(7) if RolloutConfig(reward_interval=3).due(step)] == [0, 3, 6]


def test_names_are_unique_over_groups():
    config = parse(PATHS)
    counts = sum(len(dataclasses.fields(getattr(config, group.name))) for group in dataclasses.fields(config))
    assert counts == len(to_flat_dict(config))


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--max_train_steps", "7", "--num_train_epochs", "3"], 7),
        (["--num_train_epochs", "3"], 30),
        (["--num_train_epochs", "3", "--gradient_accumulation_steps", "4"], 8),  # 30 / 4, rounded up
    ],
)
def test_total_steps(flags, steps):
    assert parse([*PATHS, *flags]).total_steps(batches_per_epoch=10) == steps


def test_warm_up_longer_than_the_epochs():
    config = parse([*PATHS, "--lr_scheduler", "linear", "--lr_warmup_steps", "11"])
    with pytest.raises(ConfigError, match="lr_warmup_steps = 11: longer than the run's 10 steps"):
        config.total_steps(batches_per_epoch=10)
