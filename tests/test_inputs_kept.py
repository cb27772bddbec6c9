"""No command overwrites an input or writes into an input folder: its main() fails before it changes anything.

The working folder of every test:

    photos/ masks/ refs/    a.png and b.png each
    set/                    a data set: input/ mask/ gt/ ref/ result/ and labeled.json, triplets.json
    model/transformer/      the folder of a base, with config.json
    run/checkpoints/4       a checkpoint of an earlier run, and run/config.toml
    link                    a symbolic link to a folder; each test chooses the folder
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ra_jax import evaluate, infer, train
from ra_jax.aot import __main__ as aot
from ra_jax.data import __main__ as data
from ra_jax.demo import __main__ as demo

NAMES = ("a", "b")
RUN_CONFIG = '# data\ntrain_json_path = "set/#labeled.json"\n\n# run\noutput_dir = "run"\nseed = 0\n'


def write_image(path, seed):
    """Write a random image of 32 × 32 pixels; in mask/ and masks/ it has one channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(128, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels[..., 0] if path.parent.name in ("mask", "masks") else pixels).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch, make_checkpoint_files):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: None)  # train's logging would remain for other tests
    subfolders = ("photos", "masks", "refs", "set/input", "set/mask", "set/gt", "set/ref", "set/result")
    for number, subfolder in enumerate(subfolders):
        for i, name in enumerate(NAMES):
            write_image(Path(subfolder, f"{name}.png"), 10 * number + i)
    records = [
        {"src": f"input/{name}.png", "mask": f"mask/{name}.png", "result": f"result/{name}.png", "scores": [1, 1, 1]}
        for name in NAMES
    ]
    Path("set/labeled.json").write_text(json.dumps(records))
    Path("set/triplets.json").write_text(json.dumps({"mapping": {f"{name}.png": [f"{name}.png"] for name in NAMES}}))
    Path("model/transformer").mkdir(parents=True)
    Path("model/transformer/config.json").write_text("{}")
    make_checkpoint_files(Path("run/checkpoints/4"))
    Path("run/config.toml").write_text(RUN_CONFIG)
    return tmp_path


def tree_state(root):
    """Return the target of each link, and content, time, inode and link count of each file, below `root`, by path."""
    entries = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            entries[name] = os.readlink(path)
        else:
            status = path.lstat()
            content = path.read_bytes() if path.is_file() else None
            entries[name] = (content, status.st_mtime_ns, status.st_ino, status.st_nlink)
    return entries


def fail_to_run(main, argv, capsys):
    """Run a command that must end with exit status 1, and return its message."""
    try:
        status = main(argv)
    except SystemExit as end:
        assert isinstance(end.code, str)  # Python prints it and exits with status 1
        return end.code
    assert status == 1
    return capsys.readouterr().err


def fail_safely(command, argv, capsys):
    """Run a command that must fail without changing anything, and return its message."""
    before = tree_state(Path())
    message = fail_to_run(COMMANDS[command], argv, capsys)
    assert tree_state(Path()) == before
    assert message.startswith("error: ")
    return message


COMMANDS = {
    "infer": infer.main,
    "evaluate": evaluate.main,
    "train": train.main,
    "pack": data.main,
    "synth": data.main,
    "demo": demo.main,
    "aot": aot.main,
}


@dataclass(frozen=True)
class CommandPaths:
    """Arguments of a command, and paths that it reads and writes."""

    arguments: str  # up to the output folder
    input_folder: str
    other_folder: str  # another input folder, or the same if there is only one
    mask_folder: str  # an input folder with masks
    output_file: str | None  # a file in the output folder; None if the output is always a new folder


COMMAND_PATHS = {
    "infer": CommandPaths(
        arguments="--source_image photos --source_mask masks --ref_image refs --overwrite --output_dir",
        input_folder="photos",
        other_folder="refs",
        mask_folder="masks",
        output_file="a_0.png",
    ),
    "evaluate": CommandPaths(
        arguments="--results set/result --truth set/triplets.json --overwrite --output_dir",
        input_folder="set/result",
        other_folder="set/gt",
        mask_folder="set/mask",
        output_file="contact_sheet.png",
    ),
    "train": CommandPaths(
        "--train_json_path set --overwrite_output_dir --output_dir", "set", "set", "set/mask", "metrics.jsonl"
    ),
    "pack": CommandPaths("pack set", "set", "set", "set/mask", None),
}
PATH_KINDS = ("folder", "link", "hard link", "relative", "masks", "link around", "inside", "around")


@pytest.mark.parametrize("path_kind", PATH_KINDS)
@pytest.mark.parametrize("command", COMMAND_PATHS)
def test_an_input_is_not_overwritten(folder, command, path_kind, capsys):
    paths = COMMAND_PATHS[command]
    input_folder, output_file = paths.input_folder, paths.output_file
    expected = "inputs are never replaced or deleted: choose another"
    match path_kind:
        case "folder":
            output = input_folder
        case "link":
            Path("link").symlink_to(input_folder)
            output, expected = "link", "(through a link); inputs are never replaced"
        case "hard link":
            Path("out").mkdir()
            if output_file is None:  # a pack is always a new folder
                expected = "out already exists: choose another folder"
            else:
                expected = f"out/{output_file}, which is the same file as"
            os.link(
                Path(input_folder, "input" if input_folder == "set" else "", "b.png"), Path("out", output_file or "x")
            )
            output = "out"
        case "relative":
            output = f"model/../{paths.other_folder}" if command != "pack" else "set/mask/../../set"
        case "masks":
            output = paths.mask_folder
        case "link around":
            Path("link").symlink_to(Path(input_folder).parent)
            output, expected = f"link/{Path(input_folder).name}", "(through a link); inputs are never replaced"
        case "inside":
            output, expected = f"{input_folder}/new", "which is inside"
        case "around":
            output, expected = (str(folder / Path(input_folder).parent), "which contains")
            if command == "pack":  # the name of the parent folder is not valid for a pack
                Path("around").symlink_to(folder)
                output = "around"
    assert expected in fail_safely(command, [*paths.arguments.split(), output], capsys)


@pytest.mark.parametrize("path_kind", ["folder", "link", "hard link", "relative", "masks", "staging"])
@pytest.mark.parametrize("command", ["synth", "demo"])
def test_a_data_set_of_the_user_is_not_replaced(folder, command, path_kind, capsys):
    """Commands that create data have no inputs, but they do not replace existing files either."""
    expected = "contains" if command == "synth" else "holds"
    match path_kind:
        case "folder":
            output = "set"
        case "link":
            Path("link").symlink_to("set")
            output = "link"
        case "hard link":
            Path("out").mkdir()
            os.link("set/triplets.json", "out/triplets.json" if command == "synth" else "out/settings.json")
            output = "out"
        case "relative":
            output = "photos/../set"
        case "masks":
            output = "set/mask"
        case "staging":
            Path("set").rename("new.partial" if command == "synth" else "set.partial")
            output, expected = "new", "is not the unfinished folder of a stopped run"
            if command == "demo":
                output, expected = "set.partial", "holds"
    arguments = "synth --scenes 1 --size 32" if command == "synth" else "--output_dir"
    argv = [*arguments.split(), output] if command == "demo" else ["synth", output, *arguments.split()[1:]]
    assert expected in fail_safely(command, argv, capsys)


def test_a_staging_folder_that_no_demo_wrote_is_not_replaced(folder, capsys):
    Path("out/data/train.partial").mkdir(parents=True)
    Path("out/data/train.partial/mine.txt").write_text("mine")
    settings = demo.DemoSettings()
    Path("out/settings.json").write_text(json.dumps(vars(settings)))
    assert "out/data/train.partial" in fail_safely("demo", ["--output_dir", "out"], capsys)


def test_a_demo_folder_with_other_settings_is_not_replaced(folder, capsys):
    Path("out").mkdir()
    Path("out/settings.json").write_text(json.dumps(vars(demo.DemoSettings(seed=3))))
    assert "was prepared with other settings" in fail_safely("demo", ["--output_dir", "out"], capsys)
    Path("out/settings.json").write_text("no JSON")
    assert "holds settings.json, but no settings.json of a demo" in fail_safely("demo", ["--output_dir", "out"], capsys)
    for output in ("set/labeled.json", "set/labeled.json/x"):
        assert "is a file; expected a folder" in fail_safely("demo", ["--output_dir", output], capsys)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("scenes=0", "scenes = 0: expected a value at least 1"),
        ("held_out_scenes=0", "held_out_scenes = 0: expected a value at least 1"),
        ("vae_steps=0", "vae_steps = 0: expected a value at least 1"),
        ("size=33", "size = 33: expected a multiple of 8"),
        ("mix=all", "unknown mix 'all': expected one of"),
    ],
)
def test_a_demo_checks_its_settings_before_it_writes(folder, setting, expected, capsys):
    assert expected in fail_safely("demo", ["--output_dir", "out", f"--{setting}"], capsys)


def flags(**values):
    return [f"--{name}={value}" for name, value in values.items()]


SINGLE = {"source_image": "photos/a.png", "source_mask": "masks/a.png"}


class TestInfer:
    def test_a_mask_with_the_name_of_a_candidate_is_not_overwritten(self, folder, capsys):
        Path("masks/a.png").rename("photos/a_0.png")
        argv = flags(source_image="photos/a.png", source_mask="photos/a_0.png", output_dir="photos")
        for overwrite in ([], ["--overwrite"]):
            message = fail_safely("infer", [*argv, *overwrite], capsys)
            assert "would write photos/a_0.png, which is an input of --source_mask" in message
            assert "--overwrite" not in message

    def test_another_photo_with_the_name_of_a_candidate_is_not_overwritten(self, folder, capsys):
        Path("photos/b.png").rename("photos/a_0.png")
        for overwrite in ([], ["--overwrite"]):
            message = fail_safely("infer", [*flags(**SINGLE, output_dir="photos"), *overwrite], capsys)
            assert "photos/a_0.png: already exists, but photos/records.json does not name it as a result" in message
            assert "--overwrite" not in message

    def test_a_data_file_named_records_json_is_not_overwritten(self, folder, capsys):
        Path("set/labeled.json").rename("set/records.json")
        argv = [*flags(source_image="set/records.json", output_dir="set"), "--overwrite"]
        assert "would write set/records.json, which is an input of --source_image" in fail_safely("infer", argv, capsys)

    def test_a_result_that_the_data_file_names_is_not_overwritten(self, folder, capsys):
        """The data file names earlier candidates in the folder to which new ones would be written."""
        Path("set/result/a.png").rename("set/result/a_0.png")
        text = Path("set/labeled.json").read_text()
        Path("set/labeled.json").write_text(text.replace("result/a.png", "result/a_0.png"))
        argv = [*flags(source_image="set/labeled.json", output_dir="set/result"), "--overwrite"]
        assert "set/result/a_0.png, which is the same file as" not in fail_safely("infer", argv, capsys)
        assert "set/result/a_0.png, which is an input of --source_image" in fail_safely("infer", argv, capsys)

    def test_nothing_is_written_into_a_folder_whose_masks_are_found_by_name(self, folder, capsys):
        for source in ("set/triplets.json", "set/labeled.json", "set"):
            for output in ("set/mask", "set/mask/new"):
                argv = flags(source_image=source, output_dir=output)
                assert f"would write into {output}, which" in fail_safely("infer", argv, capsys)

    def test_nothing_is_written_into_the_folders_of_models_and_experts(self, folder, monkeypatch, capsys):
        models = {"pretrained_model_name_or_path": "model", "pretrained_redux_model_name_or_path": "owner/redux"}
        monkeypatch.setattr(infer, "model_settings", lambda config: models)
        for output, read in {"model/out": "pretrained_model_name_or_path", "run/checkpoints/4/out": "experts"}.items():
            argv = flags(**SINGLE, experts="run", output_dir=output)
            assert f"an input of --{read}" in fail_safely("infer", argv, capsys)


class TestEvaluate:
    def test_a_result_named_contact_sheet_png_is_not_overwritten(self, folder, capsys):
        Path("set/result/a.png").rename("set/result/contact_sheet.png")
        text = Path("set/labeled.json").read_text()
        Path("set/labeled.json").write_text(text.replace("result/a.png", "result/contact_sheet.png"))
        argv = flags(results="set/labeled.json", truth="set/triplets.json", output_dir="set/result")
        for more in ([], ["--overwrite"], ["--overwrite", "--sheet_rows=0"], ["--overwrite", "--only=b.png"]):
            message = fail_safely("evaluate", [*argv, *more], capsys)
            assert "set/result/contact_sheet.png, which is an input of --results" in message

    def test_a_photo_that_records_json_names_is_not_overwritten(self, folder, capsys):
        """records.json of a folder that infer wrote names photos in another folder."""
        Path("made").mkdir()
        Path("photos/b.png").rename("photos/contact_sheet.png")
        record = {"src": "../photos/contact_sheet.png", "mask": "../masks/b.png", "result": "../set/result/b.png"}
        Path("made/records.json").write_text(json.dumps([record]))
        message = fail_safely("evaluate", [*flags(results="made", output_dir="photos"), "--overwrite"], capsys)
        assert "which is the same file as made/../photos/contact_sheet.png, an input of --results (records" in message

    @pytest.mark.parametrize("name", ["summary.json", "metrics.csv", "contact_sheet.png", "link"])
    @pytest.mark.parametrize("more", [[], ["--overwrite"], ["--overwrite", "--sheet_rows=0"]])
    def test_files_that_no_evaluation_wrote_are_not_overwritten(self, folder, name, more, capsys):
        Path("mine").mkdir()
        if name == "link":
            name = "contact_sheet.png"
            Path("mine/contact_sheet.png").symlink_to("/nowhere")
        else:
            Path("mine", name).write_text('{"metrics": "my own"}')
        argv = [*flags(results="set/labeled.json", truth="set/triplets.json", output_dir="mine"), *more]
        message = fail_safely("evaluate", argv, capsys)
        assert f"mine/{name}: already exists, and mine holds no summary.json of an earlier" in message
        assert "move it" in message and "--overwrite" not in message

    def test_an_earlier_evaluation_with_a_link_is_replaced_only_with_overwrite(self, folder, capsys):
        Path("mine").mkdir()
        Path("mine/summary.json").write_text('{"settings": {}, "metrics": {}}')
        Path("mine/contact_sheet.png").symlink_to("/nowhere")
        argv = flags(results="set/labeled.json", truth="set/triplets.json", output_dir="mine", sheet_rows=0)
        assert "already exists; choose another --output_dir, or add --overwrite" in fail_safely(
            "evaluate", argv, capsys
        )

    def test_weights_may_be_inside_the_output_folder(self, folder, capsys):
        """The output is allowed; the command fails later, because the folder is no CLIP model."""
        argv = flags(results="set/labeled.json", truth="set/triplets.json", clip_model="model", output_dir=".")
        message = fail_safely("evaluate", argv, capsys)
        assert "--clip_model" in message and "would write" not in message

    def test_nothing_is_written_into_the_folder_of_weights(self, folder, capsys):
        argv = flags(results="set/labeled.json", truth="set/triplets.json", clip_model="model", output_dir="model/out")
        assert "which is inside model, an input of --clip_model" in fail_safely("evaluate", argv, capsys)


class TestPack:
    def test_a_folder_that_contains_the_data_file_is_not_replaced(self, folder, capsys):
        """The message must not advise to delete the folder."""
        message = fail_safely("pack", ["pack", "set/labeled.json", "set"], capsys)
        assert "FOLDER: would write set, which contains set/labeled.json, an input of FILE" in message

    def test_nothing_is_written_into_the_folder_of_the_encoder(self, folder, capsys):
        argv = ["pack", "set/labeled.json", "model/packed", "--latents", "--pretrained_model_name_or_path", "model"]
        assert "which is inside model, an input of --pretrained_model_name_or_path" in fail_safely("pack", argv, capsys)


class TestTrain:
    def test_data_in_a_folder_that_the_run_would_delete_are_not_deleted(self, folder, capsys):
        Path("set").rename("run/previews")
        argv = flags(train_json_path="run/previews/labeled.json", output_dir="run")
        message = fail_safely("train", [*argv, "--overwrite_output_dir"], capsys)
        assert "would write run/previews, which contains run/previews/labeled.json, an input of --train" in message

    def test_a_preview_that_a_data_file_names_is_not_overwritten(self, folder, capsys):
        Path("new/previews").mkdir(parents=True)
        Path("set/result/a.png").rename("new/previews/step_000000.png")
        text = Path("set/labeled.json").read_text()
        Path("set/labeled.json").write_text(text.replace("result/a.png", "../new/previews/step_000000.png"))
        argv = flags(train_json_path="set/triplets.json", val_json_path="set/labeled.json", output_dir="new")
        message = fail_safely("train", argv, capsys)
        assert "step_000000.png, an input of --val_json_path" in message

    def test_the_output_folder_must_not_be_in_the_folder_of_the_base(self, folder, capsys):
        for output, relation in {"model": "is an input", "model/run": "is inside model"}.items():
            argv = flags(train_json_path="set/labeled.json", pretrained_model_name_or_path="model", output_dir=output)
            assert f"which {relation}" in fail_safely("train", argv, capsys)

    def test_the_base_may_be_inside_the_output_folder(self, folder, capsys):
        """The output is allowed; the command fails later, because the base is incomplete."""
        argv = flags(train_json_path="set/labeled.json", pretrained_model_name_or_path="model", output_dir=".")
        assert "model has no vae/, scheduler/" in fail_safely("train", argv, capsys)

    def test_a_base_in_a_folder_that_the_run_would_delete_is_not_deleted(self, folder, capsys):
        Path("model").rename("run/previews")
        argv = flags(train_json_path="set/labeled.json", pretrained_model_name_or_path="run/previews", output_dir="run")
        message = fail_safely("train", [*argv, "--overwrite_output_dir"], capsys)
        assert "would write run/previews, which is an input of --pretrained_model_name_or_path" in message

    def test_checkpoints_of_another_run_are_not_overwritten_through_a_link(self, folder, capsys):
        Path("new").mkdir()
        Path("new/checkpoints").symlink_to(folder / "run/checkpoints")
        argv = flags(train_json_path="set/labeled.json", resume_from_checkpoint="run/checkpoints/4", output_dir="new")
        message = fail_safely("train", argv, capsys)
        assert "would write new/checkpoints, which contains" in message
        assert "an input of --resume_from_checkpoint (through a link)" in message

    @pytest.mark.parametrize("flag", ["--overwrite_output_dir", "--resume_from_checkpoint=latest", "--log_freq=1"])
    def test_a_configuration_written_by_hand_is_not_replaced(self, folder, flag, capsys):
        Path("mine").mkdir()
        for text in ("seed = 3\n", '# my settings\nsome = "x"\n', "# data\nseed = 3  # as in the paper\n"):
            Path("mine/config.toml").write_text(text)
            argv = [*flags(train_json_path="set/labeled.json", output_dir="mine"), flag]
            assert "mine/config.toml: the run would replace it" in fail_safely("train", argv, capsys)

    def test_the_configuration_that_is_read_is_neither_replaced_nor_deleted(self, folder, capsys):
        Path("run/previews").mkdir()
        Path("run/previews/mine.toml").write_text("seed = 3\n")
        Path("mine.toml").write_text("seed = 3\n")
        os.link("mine.toml", "run/metrics.jsonl")
        for file, expected in {
            "run/previews/mine.toml": "run/previews, which contains run/previews/mine.toml, an input of --config",
            "mine.toml": "run/metrics.jsonl, which is the same file as mine.toml, an input of --config (by a hard",
        }.items():
            argv = flags(config=file, train_json_path="set/labeled.json", output_dir="run")
            assert expected in fail_safely("train", [*argv, "--overwrite_output_dir"], capsys)

    def test_a_runs_own_configuration_may_be_read(self, folder, capsys):
        """The output is allowed; the command fails later, because the data file does not exist."""
        for flag in ("--overwrite_output_dir", "--resume_from_checkpoint=latest"):
            Path("run/checkpoints/4").rename("elsewhere")
            message = fail_safely("train", ["--config", "run/config.toml", flag], capsys)
            assert "set/#labeled.json: no such file or folder" in message
            Path("elsewhere").rename("run/checkpoints/4")


class TestAot:
    ARGUMENTS = ("--topology", "v5e:1x1", "--use_lora", "--pretrained_model_name_or_path", "model")

    def test_the_configuration_is_not_overwritten(self, folder, capsys):
        Path("mine.toml").write_text("seed = 3\n")
        Path("link.toml").symlink_to("mine.toml")
        os.link("mine.toml", "hard.toml")
        for output, expected in {
            "mine.toml": "mine.toml, which is an input of --config;",
            "photos/../mine.toml": "an input of --config;",
            "link.toml": "an input of --config (through a link);",
            "hard.toml": "an input of --config (by a hard link);",
        }.items():
            argv = [*self.ARGUMENTS, "--json", output, "--config", "mine.toml"]
            assert expected in fail_safely("aot", argv, capsys)

    def test_the_files_of_the_base_are_not_overwritten(self, folder, capsys):
        argv = [*self.ARGUMENTS, "--json", "model/transformer/config.json"]
        assert "which is inside model, an input of --pretrained_model" in fail_safely("aot", argv, capsys)

    def test_a_missing_output_folder_is_refused(self, folder, capsys):
        argv = [*self.ARGUMENTS, "--json", "none/out.json"]
        assert "--json none/out.json: the folder none does not exist" in fail_safely("aot", argv, capsys)
