"""The command line and TOML files of `python -m ra_jax.train`, and a configuration as a dictionary and as TOML."""

import dataclasses
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest

import ra_jax.config
from ra_jax import errors
from ra_jax.config import settings
from ra_jax.config.parse import from_checkpoint, from_flat_dict, parse, to_flat_dict, to_toml
from ra_jax.config.ranges import field_ranges
from ra_jax.config.settings import TrainConfig
from ra_jax.errors import ConfigError

PATHS = ["--train_json_path", "data.json", "--output_dir", "out"]
GRPO = ["--use_grpo", "--use_human_scores", "--enable_grpo_rewards", "--enable_grpo_loss"]
HUMAN = [*PATHS, *GRPO, "--use_lora"]
AUTOMATIC = ["--use_grpo", "--enable_grpo_rewards", "--enable_grpo_loss"]


@pytest.mark.parametrize("file", sorted(Path("configs").glob("*.toml")), ids=lambda path: path.name)
def test_configuration_files_are_valid(file):
    """The comment at the head of each file shows its command. The flags here are those of that command."""
    assert f"--config configs/{file.name}" in file.read_text()
    config = parse(["--config", str(file), "--train_json_path", "data.json", "--val_json_path", "held_out.json"])
    expected = {"standard": "standard", "human": "human", "auto": "automatic", "tiny": "human"}
    assert config.mode == expected[file.stem.split("_")[-1]]


def test_hyphens_underscores_and_switches():
    flags = ["--train-json-path=data.json", "--output-dir=out", "--no-use_grpo", "--no-mask-augmentation"]
    config = parse(flags)
    assert config.data.train_json_path == "data.json"
    assert config.grpo.use_grpo is False
    assert config.data.mask_augmentation is False


def test_lists_and_unions(monkeypatch):
    monkeypatch.setattr("ra_jax.config.checks.find_spec", lambda name: name)  # as if wandb were installed
    config = parse([*HUMAN, "--policy_temperature", "auto", "--report_to", "tensorboard", "wandb"])
    assert config.grpo.policy_temperature == "auto"
    assert config.logging.report_to == ("tensorboard", "wandb")
    assert parse([*HUMAN, "--policy_temperature", "0.3"]).grpo.policy_temperature == 0.3


def test_the_command_line_overrides_toml(write_toml):
    toml = write_toml('train_json_path = "a.json"\nlearning_rate = 3e-4\nseed = 7\nuse_lora = true\n')
    config = parse([*toml, "--output_dir", "out", "--seed", "8", "--no-use_lora"])
    assert config.data.train_json_path == "a.json"
    assert config.optimization.learning_rate == 3e-4
    assert config.run.seed == 8
    assert config.experts.use_lora is False


def test_toml_is_checked_together_with_the_command_line(write_toml):
    toml = write_toml("use_lora = true\nnum_experts = 2\n")
    config = parse([*toml, *PATHS, "--fixed_expert_weights", "0.3", "0.7"])
    assert config.experts.weights == (0.3, 0.7)


def test_the_error_for_an_unknown_flag_names_a_similar_one(catch_parse_error):
    message = catch_parse_error([*PATHS, "--num_exprts", "3"])
    assert "unknown flag --num_exprts" in message
    assert "num_experts" in message


class TestFormerNames:
    """routing_specialisation is the former name of routing_specialization."""

    @pytest.mark.parametrize(
        "flags",
        [
            ["--routing_specialisation", "0.3"],
            ["--routing_specialisation=0.3"],
            ["--routing-specialisation", "0.3"],
        ],
    )
    def test_a_flag_may_have_its_former_name(self, flags):
        assert parse([*HUMAN, *flags]).experts.routing_specialization == 0.3

    def test_a_toml_key_may_have_its_former_name(self, write_toml):
        toml = write_toml("routing_specialisation = 0.3\n")
        assert parse([*toml, *HUMAN]).experts.routing_specialization == 0.3
        # The command line overrides the file, by either name.
        for flag in ("--routing_specialization", "--routing_specialisation"):
            assert parse([*toml, *HUMAN, flag, "0.4"]).experts.routing_specialization == 0.4

    def test_a_checkpoints_configuration_may_have_the_former_name(self):
        flat = to_flat_dict(parse(HUMAN))
        del flat["routing_specialization"]
        flat["routing_specialisation"] = 0.3
        for config in (from_checkpoint(flat), from_flat_dict(flat)):
            assert config.experts.routing_specialization == 0.3

    @pytest.mark.parametrize(
        "flags",
        [
            ["--routing_specialisation", "0.3", "--routing_specialization", "0.4"],
            ["--routing-specialization=0.4", "--routing-specialisation=0.3"],
        ],
    )
    def test_a_flag_under_both_names_is_refused(self, flags, catch_parse_error):
        expected = "--routing_specialisation is the former name of --routing_specialization, and both are given"
        assert expected in catch_parse_error([*HUMAN, *flags])

    def test_a_key_under_both_names_is_refused(self, catch_parse_error, write_toml):
        expected = "routing_specialisation is the former name of routing_specialization, and both are given"
        toml = write_toml("routing_specialisation = 0.3\nrouting_specialization = 0.4\n")
        message = catch_parse_error([*toml, *HUMAN])
        assert "run.toml" in message and expected in message
        with pytest.raises(ConfigError, match=expected):
            from_checkpoint(to_flat_dict(parse(HUMAN)) | {"routing_specialisation": 0.3})

    def test_the_present_name_is_written(self):
        text = to_toml(parse([*HUMAN, "--routing_specialisation", "0.3"]))
        assert "routing_specialization = 0.3" in text and "specialisation" not in text


@pytest.mark.parametrize("flag", ["--no_seed", "--no_such_thing", "--no-learning-rate=3"])
def test_only_switches_can_be_switched_off(flag, catch_parse_error):
    assert f"unknown flag {flag.split('=')[0]}" in catch_parse_error([*PATHS, flag])


def test_the_error_for_an_unknown_toml_key_names_the_file_and_a_similar_key(catch_parse_error, write_toml):
    message = catch_parse_error([*write_toml("learning_rat = 1e-4\n"), *PATHS])
    assert "run.toml" in message
    assert "unknown key learning_rat; the most similar name is learning_rate" in message


def test_toml_tables_are_refused(catch_parse_error, write_toml):
    message = catch_parse_error([*write_toml("[losses]\nbase_loss_weight = 1.0\n"), *PATHS])
    assert "table [losses]: settings are not in tables" in message


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
def test_toml_values_of_the_wrong_type(line, expected, catch_parse_error, write_toml):
    message = catch_parse_error([*write_toml(line), *PATHS])
    assert "run.toml" in message
    assert expected in message


def test_toml_files_that_cannot_be_read(tmp_path, catch_parse_error, write_toml):
    assert "no such file" in catch_parse_error(["--config", str(tmp_path / "none.toml"), *PATHS])
    assert "not valid TOML" in catch_parse_error([*write_toml("seed = = 1"), *PATHS])


def test_a_folder_and_a_binary_file_as_configuration_are_refused(catch_parse_error, tmp_path):
    assert f"--config {tmp_path}: cannot be read (Is a directory)" in catch_parse_error(
        ["--config", str(tmp_path), *PATHS]
    )
    (tmp_path / "binary.toml").write_bytes(b"seed = 1\n\xff\xfe")
    message = catch_parse_error(["--config", str(tmp_path / "binary.toml"), *PATHS])
    assert "binary.toml: not valid TOML: 'utf-8' codec can't decode byte 0xff" in message
    assert "no file given" in catch_parse_error([*PATHS, "--config"])


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


def test_help_has_the_range_of_every_number(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(line.strip("│| ") for line in capsys.readouterr().out.splitlines())
    help_texts = {help_text.split()[0]: help_text for help_text in re.split(r"--(?=\w+ [A-Z{[])", text)}
    for group in typing.get_type_hints(TrainConfig).values():
        for name, limit in field_ranges(group).items():
            assert limit.expected.removeprefix("a value ") in help_texts[name]


def test_flat_dict_and_toml_give_the_configuration_back(write_toml):
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
    assert parse(write_toml(text)) == config
    assert set(tomllib.loads(text)) == {name for name, value in to_flat_dict(config).items() if value is not None}


def test_the_settings_of_a_checkpoint_are_read_without_the_checks_of_a_new_run(monkeypatch):
    """The settings of a run that reported to wandb can be read without wandb."""
    monkeypatch.setattr("ra_jax.config.checks.find_spec", lambda name: None)
    flat = to_flat_dict(parse(PATHS)) | {"report_to": ["wandb"]}
    assert from_checkpoint(flat).logging.report_to == ("wandb",)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        from_flat_dict(flat)


def test_the_command_line_is_parsed_without_jax():
    """Wrong flags are then rejected quickly, and before a device is touched."""
    code = "import sys, ra_jax.config.parse; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_the_single_module_of_0_1_are_importable_from_the_package():
    places = {
        errors: "ConfigError",
        settings: "DataConfig ExpertsConfig GRPOConfig LoggingConfig LossConfig ModelConfig OptimizationConfig"
        " ParallelConfig RolloutConfig RunConfig TrainConfig",
        sys.modules["ra_jax.config.parse"]: "from_checkpoint from_flat_dict load_toml parse to_flat_dict to_toml",
    }
    for module, names in places.items():
        for name in names.split():
            assert getattr(ra_jax.config, name) is getattr(module, name)
    assert sorted(" ".join(places.values()).split()) == sorted(ra_jax.config.__all__)


def test_a_checkpoint_of_an_earlier_release_has_no_limit():
    settings = {"train_json_path": "data.json", "output_dir": "run"} | {"checkpoints_total_limit": None}
    assert from_checkpoint(settings).run.checkpoints_total_limit == 0
