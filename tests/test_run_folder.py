"""The folder of a run: files that are written, deleted and kept."""

from dataclasses import replace

import pytest

from ra_jax import run_folder
from ra_jax.config.parse import from_flat_dict, load_toml, to_toml
from ra_jax.errors import OutputError
from ra_jax.run_folder import CONFIG_FILE, PREVIOUS_CONFIG, check_config_unedited, prepare_output_dir


@pytest.fixture
def config(tmp_path):
    return from_flat_dict(
        {
            "train_json_path": 'data/"#1"\\x.json',
            "output_dir": str(tmp_path / "run"),
            "overwrite_output_dir": True,
            "use_lora": True,
            "target_modules": r"blocks\.#",
        }
    )


@pytest.fixture
def output(config, tmp_path):
    prepare_output_dir(config, tmp_path / "run", keep=False)
    return tmp_path / "run"


def test_the_config_file_of_a_run_is_accepted(output):
    check_config_unedited(output / CONFIG_FILE)


@pytest.mark.parametrize("change", ["# mine: a second try\n", "seed = 3  # as in the paper\n", "# mine\n", None])
def test_a_config_file_with_a_users_comments_is_refused(output, change):
    file = output / CONFIG_FILE
    text = file.read_text()
    file.write_text("seed = 3\n" if change is None else text + change)
    with pytest.raises(OutputError, match=r"config\.toml: the run would replace it .*no run wrote it; move it"):
        check_config_unedited(file)


@pytest.mark.parametrize("keep", [True, False])
def test_a_copy_of_edited_values_is_kept(output, config, keep, caplog):
    file, former = output / CONFIG_FILE, output / PREVIOUS_CONFIG
    prepare_output_dir(config, output, keep=keep)
    assert not former.exists() and not caplog.messages  # the same settings
    settings = file.read_bytes()
    edited = settings.replace(b"use_lora = true", b"use_lora = false")
    assert edited != settings
    file.write_bytes(edited)
    prepare_output_dir(config, output, keep=keep)
    assert (file.read_bytes(), former.read_bytes()) == (settings, edited)
    assert caplog.messages == [f"{file} has other settings than this run: a copy is kept as {former}"]
    check_config_unedited(former)


def test_a_config_file_with_a_former_name_has_the_same_settings(output, config, caplog):
    file, earlier = output / CONFIG_FILE, output / PREVIOUS_CONFIG
    earlier.write_text("the settings of an earlier run")
    text = file.read_text()
    file.write_text(text.replace("routing_specialization", "routing_specialisation"))
    assert "routing_specialisation" in file.read_text()
    prepare_output_dir(config, output, keep=True)
    assert file.read_text() == text and not caplog.messages
    assert earlier.read_text() == "the settings of an earlier run"


def test_the_folder_holds_a_run_at_every_moment(output, config, monkeypatch):
    (output / "metrics.jsonl").touch()

    def killed(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "write_file", killed)
        prepare_output_dir(config, output, keep=False)
    assert load_toml(output / CONFIG_FILE)["target_modules"] == r"blocks\.#"
    assert not (output / "metrics.jsonl").exists()


def test_links_in_the_folder_are_deleted_and_their_targets_kept(output, config, tmp_path):
    (tmp_path / "album").mkdir()
    (tmp_path / "album/a.png").write_text("mine")
    (output / "previews").symlink_to(tmp_path / "album")
    (output / CONFIG_FILE).rename(tmp_path / "mine.toml")
    (output / CONFIG_FILE).symlink_to(tmp_path / "mine.toml")
    before = (tmp_path / "mine.toml").stat().st_mtime_ns
    prepare_output_dir(config, output, keep=False)
    assert not (output / "previews").is_symlink()
    assert (tmp_path / "album/a.png").read_text() == "mine"
    assert (tmp_path / "mine.toml").stat().st_mtime_ns == before
    assert not (output / CONFIG_FILE).is_symlink() and (output / CONFIG_FILE).read_text().startswith("# data\n")


def test_the_output_of_to_toml_is_accepted_as_the_config_file_of_a_run(config, tmp_path):
    (tmp_path / CONFIG_FILE).write_text(to_toml(config))
    check_config_unedited(tmp_path / CONFIG_FILE)


def test_a_run_that_starts_again_makes_a_new_copy_of_its_reference(output, config):
    """It was stopped before its first checkpoint. All other files stay."""
    (output / "reference/0").mkdir(parents=True)
    (output / "metrics.jsonl").touch()
    config = replace(config, run=replace(config.run, overwrite_output_dir=False))
    prepare_output_dir(config, output, keep=True)
    assert (output / "reference/0").exists()
    prepare_output_dir(config, output, keep=False)
    assert not (output / "reference").exists() and (output / "metrics.jsonl").exists()
