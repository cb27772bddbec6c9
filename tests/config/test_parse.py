"""The command line, TOML files and cross-checks of `python -m ra_jax.train`."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from ra_jax.config import checks as config_checks
from ra_jax.config.parse import from_flat_dict, parse, to_flat_dict, to_toml
from ra_jax.config.settings import TrainConfig
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


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def refusal(argv):
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return str(caught.value)


def test_the_guides_human_command():
    config = parse(GUIDE_HUMAN.split())
    assert config.mode == "human"
    assert config.uses_policy
    assert config.base_loss_weighting == "score"
    assert config.grpo.reward_weights == (0.4, 0.3, 0.3)
    assert config.run.max_train_steps == 10000
    # Every value that the guide spells out is also the default.
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


def test_modes():
    assert parse([*PATHS, "--use_grpo"]).mode == "standard"  # no rewards were asked for
    automatic = parse([*PATHS, *AUTOMATIC])
    assert (automatic.mode, automatic.uses_policy, automatic.updates) == ("automatic", True, 2)
    assert automatic.base_loss_weighting == "none"
    assert parse([*PATHS, *AUTOMATIC[:2]]).mode == "automatic"
    assert parse(HUMAN).updates == 1


@pytest.mark.parametrize("file", sorted(Path("configs").glob("*.toml")), ids=lambda path: path.name)
def test_configuration_files_are_sound(file):
    """With the paths that their heads ask for; each says how it is used."""
    assert f"--config configs/{file.name}" in file.read_text()
    config = parse(["--config", str(file), "--train_json_path", "data.json", "--val_json_path", "held_out.json"])
    expected = {"standard": "standard", "human": "human", "auto": "automatic", "tiny": "human"}
    assert config.mode == expected[file.stem.split("_")[-1]]


def test_hyphens_underscores_and_switches():
    given = ["--train-json-path=data.json", "--output-dir=out", "--no-use_grpo", "--no-mask-augmentation"]
    config = parse(given)
    assert config.data.train_json_path == "data.json"
    assert config.grpo.use_grpo is False
    assert config.data.mask_augmentation is False


def test_lists_and_unions(monkeypatch):
    monkeypatch.setattr("ra_jax.config.checks.find_spec", lambda name: name)  # as if wandb were installed
    config = parse([*HUMAN, "--policy_temperature", "auto", "--report_to", "tensorboard", "wandb"])
    assert config.grpo.policy_temperature == "auto"
    assert config.logging.report_to == ("tensorboard", "wandb")
    assert parse([*HUMAN, "--policy_temperature", "0.3"]).grpo.policy_temperature == 0.3


def test_the_command_line_wins_over_toml(tmp_path):
    toml = write(tmp_path, 'train_json_path = "a.json"\nlearning_rate = 3e-4\nseed = 7\nuse_lora = true\n')
    config = parse([*toml, "--output_dir", "out", "--seed", "8", "--no-use_lora"])
    assert config.data.train_json_path == "a.json"
    assert config.optimization.learning_rate == 3e-4
    assert config.run.seed == 8
    assert config.experts.use_lora is False


def test_toml_is_checked_together_with_the_command_line(tmp_path):
    toml = write(tmp_path, "use_lora = true\nnum_experts = 2\n")
    config = parse([*toml, *PATHS, "--fixed_expert_weights", "0.3", "0.7"])
    assert config.experts.weights == (0.3, 0.7)


def test_unknown_flag_names_the_nearest():
    message = refusal([*PATHS, "--num_exprts", "3"])
    assert "unknown flag --num_exprts" in message
    assert "num_experts" in message


@pytest.mark.parametrize("flag", ["--no_seed", "--no_such_thing", "--no-learning-rate=3"])
def test_only_switches_can_be_switched_off(flag):
    assert f"unknown flag {flag.split('=')[0]}" in refusal([*PATHS, flag])


def test_unknown_toml_key_names_file_and_nearest(tmp_path):
    message = refusal([*write(tmp_path, "learning_rat = 1e-4\n"), *PATHS])
    assert "run.toml" in message
    assert "unknown key learning_rat; the nearest known one is learning_rate" in message


def test_toml_tables_are_refused(tmp_path):
    message = refusal([*write(tmp_path, "[losses]\nbase_loss_weight = 1.0\n"), *PATHS])
    assert "table [losses]" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('num_experts = "three"', "num_experts = 'three': expected a whole number"),
        ("num_experts = true", "num_experts = True: expected a whole number"),
        ("num_experts = 3.0", "num_experts = 3.0: expected a whole number"),
        ("use_grpo = 1", "use_grpo = 1: expected true or false"),
        ('score_format = "list"', "score_format = 'list': expected one of dict, tensor"),
        ('policy_temperature = "warm"', 'expected a number or "auto"'),
        ("fixed_expert_weights = 0.5", "expected a list, each item a number"),
        ("max_train_steps = 1.5", "max_train_steps = 1.5: expected a whole number"),
    ],
)
def test_toml_values_of_the_wrong_type(tmp_path, line, expected):
    message = refusal([*write(tmp_path, line), *PATHS])
    assert "run.toml" in message
    assert expected in message


def test_toml_files_that_cannot_be_read(tmp_path):
    assert "no such file" in refusal(["--config", str(tmp_path / "none.toml"), *PATHS])
    assert "not valid TOML" in refusal([*write(tmp_path, "seed = = 1"), *PATHS])
    assert "no file given" in refusal([*PATHS, "--config"])


CONTRADICTIONS = [
    (["--use_lora", "--num_experts", "2", "--expert_names", "a", "b", "c"], "expert_names has 3 (a b c)"),
    (
        ["--use_lora", "--num_experts", "2", "--fixed_expert_weights", "0.4", "0.3", "0.3"],
        "fixed_expert_weights has 3",
    ),
    (["--use_lora", "--expert_names", "a", "b", "a"], "expected names that differ"),
    (["--use_lora", "--fixed_expert_weights", "0.5", "0.3", "0.3"], "they sum to 1.1"),
    (["--use_lora", "--fixed_expert_weights", "0.02", "0.49", "0.49"], "router_floor = 0.05"),
    (["--use_lora", "--routing", "fixed", "--fixed_expert_weights", "-1", "1", "1"], "at least 0"),
    (["--use_lora", "--num_experts", "20"], "router_floor = 0.05: 20 experts"),
    (["--use_lora", "--routing", "sample"], "routing = sample"),
    (["--use_lora", "--target_modules", "("], "not a regular expression"),
    (["--lora_rank", "8"], "lora_rank without use_lora"),
    (["--use_human_scores"], "use_human_scores without use_grpo"),
    (["--enable_grpo_loss"], "enable_grpo_loss without use_grpo"),
    (["--base_loss_weighting", "best"], "base_loss_weighting = best: weighs records by their scores"),
    (["--policy_estimator", "nft"], "policy_estimator = nft: there is no policy term"),
    ([*GRPO, "--policy_estimator", "sde"], "policy_estimator = sde: judges the steps by which an image was generated"),
    ([*GRPO, "--policy_estimator", "nft"], "policy_estimator = nft with kl_weight = 0"),
    ([*AUTOMATIC, "--num_generations", "1"], "num_generations = 1: a rollout is judged against the others"),
    ([*AUTOMATIC, "--num_generations", "0"], "num_generations = 0: expected a value at least 1"),
    (["--use_lora", *GRPO, "--routing", "sample"], "routing = sample: draws an expert for each rollout"),
    (
        ["--use_lora", *AUTOMATIC, "--routing", "sample", "--policy_estimator", "nft", "--kl_weight", "0.1"],
        "nft has no ratio that a draw could join",
    ),
    ([*GRPO, "--reward_functions", "lpips"], "reward_functions = lpips: judge generated images"),
    (["--use_lora", "--max_drift", "0.05"], "max_drift without val_json_path"),
    (["--max_drift", "0.05", "--val_json_path", "v.json"], "max_drift = 0.05 without use_lora"),
    (
        [*GRPO, "--policy_temperature", "auto", "--policy_sync_steps", "1"],
        "with policy_sync_steps = 1: nothing is ever",
    ),
    ([*AUTOMATIC, "--policy_temperature", "auto", "--num_iterations", "1"], "with num_iterations = 1: nothing is ever"),
    (
        [*AUTOMATIC, "--policy_temperature", "auto", "--policy_estimator", "sde"],
        "policy_estimator sde has no temperature",
    ),
    ([*AUTOMATIC, "--base_loss_weight", "0", "--reward_interval", "2"], "steps without rollouts would have nothing"),
    (["--max_drift", "0"], "max_drift = 0.0: expected a value greater than 0"),
    (["--mixed_precision", "fp16"], "FLUX overflows it; use bf16"),
    (
        ["--lr_scheduler", "cosine", "--lr_warmup_steps", "11", "--max_train_steps", "10"],
        "lr_warmup_steps = 11",
    ),
    (["--lr_warmup_steps", "5"], "lr_scheduler constant has no warm-up"),
    (["--resume_from_checkpoint", "latest", "--overwrite_output_dir"], "give one of them"),
    (["--report_to", "none", "tensorboard"], "expected none alone"),
    (["--kl_weight", "0.5"], "there is no policy term"),
    ([*GRPO, "--kl_weight", "0.5"], "the base it is measured to is itself trained"),
    (["--train_batch_size", "0"], "train_batch_size = 0: expected a value at least 1"),
    (["--max_train_steps", "-3"], "max_train_steps = -3: expected a value at least 1"),
    (["--num_experts", "0", "--use_lora"], "num_experts = 0: expected a value at least 1"),
    (["--learning_rate", "0"], "learning_rate = 0.0: expected a value greater than 0"),
    (["--learning_rate", "nan"], "learning_rate = nan"),
    (["--clip_range", "1"], "clip_range = 1.0: expected a value between 0 and 1"),
    (["--clip_range", "0"], "clip_range = 0.0"),
    (["--ema_decay", "1"], "ema_decay = 1.0"),
    (["--policy_timestep_fraction", "0"], "policy_timestep_fraction = 0.0"),
    (["--val_json_path", "gs://bucket/held_out.json"], "val_json_path = gs://bucket/held_out.json: only folders and"),
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
def test_contradictions_and_ranges(flags, expected):
    assert expected in refusal([*PATHS, *flags])


def test_all_contradictions_are_told_at_once():
    message = refusal([*PATHS, "--use_human_scores", "--mixed_precision", "fp16", "--lora_rank", "8"])
    assert len(message.splitlines()) == 3


def test_every_number_has_a_range():
    ranged = [name for _, names in config_checks._RANGES.values() for name in names.split()]
    flat = to_flat_dict(parse(PATHS))
    numbers = {name for name, value in flat.items() if type(value) in (int, float)}
    assert numbers <= set(ranged) <= set(flat)
    assert len(ranged) == len(set(ranged))


def test_values_that_tyro_cannot_read_end_the_program(capsys):
    for flags in (["--optimizer", "sgd"], ["--num_experts", "two"], ["--use_grpo", "True"]):
        with pytest.raises(SystemExit) as caught:
            parse([*PATHS, *flags])
        assert caught.value.code == 2
    assert "invalid choice 'sgd' for argument '--optimizer'" in capsys.readouterr().err


def test_required_flags(capsys):
    with pytest.raises(SystemExit):
        parse(["--output_dir", "out"])
    assert "--train_json_path" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="output_dir: not given"):
        from_flat_dict({"train_json_path": "data.json"})


def test_help_is_grouped_and_explains_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # narrow enough that every help text starts on a line of its own
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for group in dataclasses.fields(TrainConfig):
        assert f"{group.name} options" in text
    assert "--use_grpo, --no_use_grpo" in text
    lines = [line.strip("│| ") for line in text.splitlines()]
    for name in to_flat_dict(parse(PATHS)):
        flag = next(i for i, line in enumerate(lines) if re.match(rf"--{name}\b", line))
        assert not lines[flag + 1].startswith("("), f"--{name} has a default but no help text"


def test_names_are_unique_over_groups():
    config = parse(PATHS)
    counts = sum(len(dataclasses.fields(getattr(config, group.name))) for group in dataclasses.fields(config))
    assert counts == len(to_flat_dict(config))


def test_flat_dict_and_toml_give_the_configuration_back(tmp_path):
    flags = [
        "--policy_temperature",
        "auto",
        "--expert_names",
        "a",
        "b",
        "ü 😀",
        "--resume_from_checkpoint",
        'x"y\\z',
    ]
    config = parse([*HUMAN, *flags])
    assert from_flat_dict(to_flat_dict(config)) == config
    text = to_toml(config)
    assert parse(write(tmp_path, text)) == config
    assert set(tomllib.loads(text)) == {name for name, value in to_flat_dict(config).items() if value is not None}


def test_experts_other_than_three_start_uniform():
    config = parse([*PATHS, "--use_lora", "--num_experts", "4"])
    assert config.experts.weights == (0.25,) * 4
    assert config.experts.names == ("expert_0", "expert_1", "expert_2", "expert_3")


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


def test_wandb_that_is_not_installed_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("ra_jax.config.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        parse([*HUMAN, "--report_to", "wandb"])
