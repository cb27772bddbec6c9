"""Files that `python -m ra_jax.train` does not overwrite, and files that it accepts as a run's own.

The tests call main().

The working folder of every test:

    set/labeled.json    a data file whose images are missing
    model/transformer/  a part of a base
    run/                the folder of an earlier run: config.toml and checkpoints/4
"""

import logging
from pathlib import Path

import pytest

from ra_jax import train

RUN_CONFIG = '# data\ntrain_json_path = "set/#labeled.json"\n\n# run\noutput_dir = "run"\nseed = 0\n'


@pytest.fixture
def folder(tmp_path, monkeypatch, make_checkpoint_files):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: None)  # its handler would remain for other tests
    for path in ("set", "model/transformer"):
        Path(path).mkdir(parents=True)
    make_checkpoint_files(Path("run/checkpoints/4"))
    Path("set/labeled.json").write_text('[{"src": "a.png", "mask": "b.png"}]')
    Path("run/config.toml").write_text(RUN_CONFIG)


def flags(**values):
    return [f"--{name}={value}" for name, value in values.items()]


def tree():
    """Return all files in the working folder with their contents, and all links and folders."""
    return {path: path.read_bytes() if path.is_file() else path.is_dir() for path in Path().rglob("*")}


def refused(argv):
    """Return the error message of a run that must fail and must not change any file."""
    before = tree()
    with pytest.raises(SystemExit) as ended:
        train.main(argv)
    assert isinstance(ended.value.code, str)  # Python prints it and exits with status 1
    assert tree() == before
    return ended.value.code


@pytest.mark.parametrize("more", [[], ["--overwrite_output_dir"], ["--resume_from_checkpoint=run"]])
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "report.html", "curves.png", "config.toml.before", "previews/mine.png", "link"]
)
def test_files_that_no_run_wrote_are_not_replaced(folder, name, more):
    Path("mine/previews").mkdir(parents=True)
    if name == "link":
        name = "report.html"
        Path("mine/report.html").symlink_to("later.html")
    else:
        Path("mine", name).write_text("# data\nmine")
    message = refused([*flags(train_json_path="set/labeled.json", output_dir="mine"), *more])
    assert f"mine/{name.split('/')[0]}: the run would replace it, but nothing shows that a run wrote it" in message
    assert "move it, or choose another --output_dir" in message and "--overwrite_output_dir" not in message


def test_a_run_whose_config_file_was_moved_is_still_a_run(folder):
    for part in ("state", "about"):
        Path("other/best/2", part).mkdir(parents=True)
    Path("other/metrics.jsonl").write_text('{"step": 2}\n')
    Path("run/config.toml").rename("mine.toml")
    for output in ("run", "other"):
        message = refused(flags(train_json_path="set/labeled.json", output_dir=output))
        assert f"output_dir {output} already holds a run" in message


def test_a_runs_config_file_with_comments_is_not_replaced(folder):
    """The message must not say to move the file: the checkpoints would be left without it."""
    Path("run/config.toml").write_text(RUN_CONFIG + "# the second try\n")
    message = refused(flags(train_json_path="set/labeled.json", output_dir="run"))
    assert "run/config.toml: the run would replace it with its own settings, but it was edited" in message
    assert "copy your notes to another folder" in message and "move it" not in message


def test_a_resumed_run_refuses_metrics_that_no_run_wrote(folder):
    argv = flags(train_json_path="set/labeled.json", output_dir="run", resume_from_checkpoint="latest")
    for text in ('{"step": 1}\n{"loss": 2}\n', '{"step": 1}\nnone\n', '{"step": 1}\n[2]\n'):
        Path("run/metrics.jsonl").write_text(text)
        assert "run/metrics.jsonl, line 2: expected a JSON object with" in refused(argv)


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl"])
def test_a_folder_with_the_name_of_an_output_file_is_refused(folder, name):
    Path("new", name).mkdir(parents=True)
    message = refused(flags(train_json_path="set/labeled.json", output_dir="new"))
    assert f"new/{name}" in message and "is a folder; expected a file or no file" in message


@pytest.mark.parametrize("output", ["run/checkpoints", "run/checkpoints/4", "run/checkpoints/4/new", "run/best/x"])
def test_an_output_folder_among_checkpoints_is_refused(folder, output):
    for part in ("state", "about"):
        Path("run/best/2", part).mkdir(parents=True)
    argv = flags(train_json_path="set/labeled.json", output_dir=output, init_experts_from="run")
    message = refused([*argv, "--use_lora", "--overwrite_output_dir"])
    assert f"--output_dir {output}: the run would write into " in message and "holds the checkpoints" in message


@pytest.mark.parametrize("named", ["run", "run/checkpoints", "run/checkpoints/4", "elsewhere/4", "latest"])
def test_checkpoints_in_another_folder_are_found_through_a_link(folder, named):
    """The run passes the checks of its output and fails later, because the data file does not exist."""
    Path("run/checkpoints").rename("elsewhere")
    Path("run/checkpoints").symlink_to("../elsewhere")
    argv = flags(train_json_path="none.json", output_dir="run", resume_from_checkpoint=named)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ra_jax.training.setup.resumed_config", lambda config, _: config)  # the checkpoint is empty
        assert "none.json: no such file or folder" in refused(argv)


@pytest.mark.parametrize("given", [[], ["--init_experts_from=other", "--use_lora"]])
def test_a_run_that_was_stopped_before_its_first_checkpoint_keeps_its_initial_experts(folder, given):
    """Started again at step 0 with other flags, it would have other experts."""
    Path("new").mkdir()
    Path("new/config.toml").write_text(RUN_CONFIG + 'init_experts_from = "run"\n')
    argv = flags(train_json_path="set/labeled.json", output_dir="new", resume_from_checkpoint="latest")
    message = refused([*argv, *given])
    assert "new: the run started with the experts of run, and was stopped before its first checkpoint" in message
    assert "give --init_experts_from run again, or --overwrite_output_dir for a new run" in message
    assert "the experts of run" not in refused([*argv, "--init_experts_from=run", "--use_lora"])


@pytest.mark.parametrize("best", [True, False])
def test_a_run_whose_checkpoints_are_all_broken_is_not_started_again(folder, best):
    """Its rows and its checkpoints would be lost."""
    Path("run/checkpoints/4/about/metadata").unlink()
    Path("run/metrics.jsonl").write_text('{"step": 4}\n')
    if best:
        Path("run/best/2/about").mkdir(parents=True)
    message = refused(flags(train_json_path="set/labeled.json", output_dir="run", resume_from_checkpoint="latest"))
    assert "no checkpoint in run" in message and "run/checkpoints/4" in message and "files are missing" in message


def test_initial_experts_are_not_deleted(folder):
    for experts in ("run", "run/checkpoints/4", "other/../run"):
        Path("other").mkdir(exist_ok=True)
        argv = flags(train_json_path="set/labeled.json", init_experts_from=experts, output_dir="run")
        message = refused([*argv, "--use_lora", "--overwrite_output_dir"])
        assert "would write run/checkpoints, which contains" in message and "of --init_experts_from" in message


def test_a_module_of_rewards_is_not_deleted(folder):
    Path("run/previews").mkdir()
    Path("run/previews/mine.py").write_text("def sharp(inputs): ...\n")
    argv = flags(train_json_path="set/labeled.json", output_dir="run", reward_functions="run.previews.mine:sharp=0.5")
    policy = ["--use_lora", "--use_grpo", "--enable_grpo_rewards", "--enable_grpo_loss"]
    message = refused([*argv, *policy, "--overwrite_output_dir"])
    assert "would write run/previews, which contains run/previews/mine.py, an input of --reward_functions" in message
