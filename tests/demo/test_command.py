"""`python -m ra_jax.demo` prints the command that trains on its output."""

from pathlib import Path

from ra_jax.demo.__main__ import DemoCommand, next_command
from ra_jax.demo.prepare import DemoPaths, DemoSettings


def test_the_next_command_has_no_further_flags_for_the_default_output():
    assert next_command(DemoCommand(), DemoPaths(Path("output/demo"))) == (
        "python -m ra_jax.train --config configs/tiny.toml"
    )


def test_the_next_command_has_flags_for_another_folder_and_another_size(tmp_path):
    demo_command = DemoCommand(str(tmp_path), DemoSettings(size=64))
    command = next_command(demo_command, DemoPaths(tmp_path))
    assert f"--train_json_path {tmp_path}/data/train/labeled_dict.json" in command
    assert f"--pretrained_redux_model_name_or_path {tmp_path}/tiny_redux" in command
    assert '--aspect_ratio_buckets "64,64"' in command
