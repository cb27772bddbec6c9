"""`python -m ra_jax.demo` says how to train on what it made."""

from pathlib import Path

from ra_jax.demo.__main__ import DemoCommand, next_command
from ra_jax.demo.prepare import DemoPaths, DemoSettings


def test_next_command_is_the_configuration_alone_where_it_finds_everything():
    assert next_command(DemoCommand(), DemoPaths(Path("output/demo"))) == (
        "python -m ra_jax.train --config configs/tiny.toml"
    )


def test_next_command_names_what_is_elsewhere_or_of_another_size(tmp_path):
    command = DemoCommand(str(tmp_path), DemoSettings(size=64))
    said = next_command(command, DemoPaths(tmp_path))
    assert f"--train_json_path {tmp_path}/data/train/labeled_dict.json" in said
    assert f"--pretrained_redux_model_name_or_path {tmp_path}/tiny_redux" in said
    assert '--aspect_ratio_buckets "64,64"' in said
