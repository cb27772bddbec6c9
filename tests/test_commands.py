"""Every command in README and docs is run here, checked here, or listed here with the reason why no test runs it."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from ra_jax import evaluate, infer, train
from ra_jax.config.parse import parse
from ra_jax.data import __main__ as data

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
COMMAND = re.compile(r"(\w+=(\"[^\"]*\"|\S+) )*(python|bash|pip|source|hf|\.venv/)")

# Run by `test_readmes_commands_run_one_after_another` and `test_packs_are_made_and_trained_on`, at a tiny size.
PROGRAMS = {
    "ra_jax.data": data.main,
    "ra_jax.train": train.main,
    "ra_jax.infer": infer.main,
    "ra_jax.evaluate": evaluate.main,
}

# What no test runs as it stands: the beginning of the command -> the reason.
NOT_RUN = {
    "bash scripts/test.sh": "runs the tests; continuous integration starts it",
    "PYTHON=3.13 bash scripts/test.sh": "runs the tests; continuous integration starts it",
    "PIP_EXTRA_INDEX_URL=ADDRESS bash scripts/test.sh": "runs the tests; the address is a placeholder",
    "bash scripts/demo.sh": "minutes; tests/demo/ runs its programs at a small size",
    "PYTHON=/path/to/python bash scripts/demo.sh": "as bash scripts/demo.sh; the path is a placeholder",
    "source .venv/bin/activate": "changes the shell",
    "python3.11 -m venv .venv": "installs; scripts/environment.sh does it in continuous integration",
    ".venv/bin/pip install": "installs; scripts/environment.sh does it in continuous integration",
    "pip install": "installs; scripts/environment.sh does it in continuous integration",
    ".venv/bin/ruff": "scripts/test.sh runs both checks",
    "hf auth login": "needs an account",
    "python -m ra_jax.aot": "needs libtpu; tests/aot/ runs it on CPU devices",
    "python scripts/experiments/": "minutes to hours; tests/experiments/ runs them at a small size",
    "python scripts/benchmarks/": "minutes, and for some a GPU or libtpu; tests/test_scripts.py starts each program",
    "XLA_FLAGS=": "needs a GPU",
    "bash scripts/real_photos.sh": "needs photos that are not in the package",
    "python -m ra_jax.demo": "minutes; tests/demo/ runs it at a small size",
    "python -m ra_jax.train --config configs/tiny.toml": "needs the demo's base; its flags are checked here",
    "python -m ra_jax.infer --source_image output/demo/": "needs the demo's base; tests/test_infer.py runs its like",
    "python -m ra_jax.evaluate --results output/tiny_pairs_removals": "needs the demo's base; another one is run here",
    "python -m ra_jax.train --config configs/tiny_auto.toml": "needs the demo's base; its flags are checked here",
    "python -m ra_jax.train --pretrained_model_name_or_path": "needs FLUX.1-Fill; its flags are checked here",
    "python -m ra_jax.train ...": "a fragment; its flags are checked here",
    "python -m ra_jax.train --config FILE.toml": "a fragment; its flags are checked here",
    "python -m ra_jax.train --help": "tests/config/ runs it",
}


def commands(path):
    """The commands of a document's `bash` blocks and indented blocks, without comments and line breaks."""
    text = path.read_text(encoding="utf-8")
    fenced = re.findall(r"(?ms)^```bash\n(.*?)^```", text)
    indented = re.findall(r"(?m)(?:^    [^\n]*\n)+", re.sub(r"(?ms)^```.*?^```", "", text))
    lines = [line for block in fenced + indented for line in block.replace("\\\n", " ").splitlines()]
    bare = [re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)).strip() for line in lines]
    return [line for line in bare if COMMAND.match(line)]


def arguments(command):
    """The arguments of a command without the interpreter and the program; `...` and `...words...` are left out."""
    return shlex.split(re.sub(r"\.\.\.(\w[\w ]*\.\.\.)?(?= |$)", "", command))[3:]


DOCUMENTED = {command: path.name for path in DOCUMENTS for command in commands(path)}
README = commands(ROOT / "README.md")
PACKS = [command for command in commands(ROOT / "docs" / "data.md") if "ra_jax." in command]
RUN = {command for command in [*README, *PACKS] if command.startswith("python -m ra_jax.")}
RUN.add("python -m ra_jax.evaluate --results output/removed --truth triplets.json --output_dir output/evaluated")


@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_command_is_run_or_listed_with_the_reason(command):
    listed = [beginning for beginning in NOT_RUN if command.startswith(beginning)]
    assert command in RUN or listed, f"{DOCUMENTED[command]}: neither run nor listed"


def test_the_list_has_only_commands_that_documents_have():
    assert [start for start in NOT_RUN if not any(command.startswith(start) for command in DOCUMENTED)] == []


# Not --help, and not a run's own config.toml, which only that run makes.
TRAININGS = [command for command in DOCUMENTED if command.startswith("python -m ra_jax.train")]
TRAININGS = [command for command in TRAININGS if "--help" not in command and "config.toml" not in command]


@pytest.mark.parametrize("command", TRAININGS)
def test_flags_of_training_commands_exist_and_agree(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    (tmp_path / "empty.toml").write_text("")
    examples = {"FILE.toml": str(tmp_path / "empty.toml"), "HOST:PORT": "localhost:1234"}
    given = [examples.get(token, token) for token in arguments(command)]
    required = [] if "--train_json_path" in given else ["--train_json_path", "data.json"]
    required += [] if "--output_dir" in given else ["--output_dir", "output"]
    assert parse([*required, *given]).run.output_dir


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny_fill, tiny_redux, scored_scenes):
    """A working folder with the files that the documents name, and flags that make every program small."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(scored_scenes, folder, dirs_exist_ok=True)
    for name in ("labeled_data.json", "labeled.json"):
        shutil.copy(folder / "labeled_dict.json", folder / name)
    for name in ("pairs.json", "held_out.json"):
        shutil.copy(folder / "triplets.json", folder / name)
    shutil.copytree(folder / "input", folder / "photos")
    shutil.copytree(folder / "mask", folder / "masks")
    base = ["--pretrained_model_name_or_path", str(tiny_fill), "--pretrained_redux_model_name_or_path", str(tiny_redux)]
    training = "--max_sequence_length 8 --mixed_precision no --base_precision auto --gradient_checkpointing none "
    training += "--lora_rank 2 --lora_alpha 2 --target_modules .*\\.(to_q|proj_mlp) --max_train_steps 1 "
    training += "--train_batch_size 4 --gradient_accumulation_steps 1 --num_policy_timesteps 1 --validation_steps 0 "
    training += "--num_generations 2 --rollout_steps 2 --num_iterations 1 --report_to none --data_workers 0"
    small = {
        "ra_jax.train": [*base, *training.split()],
        "ra_jax.infer": [*base, "--num_inference_steps", "1", "--mixed_precision", "no"],
    }
    return folder, base, small


def start(command, desk, monkeypatch):
    """Runs a documented command in the working folder, with the flags that make it small."""
    folder, base, small = desk
    monkeypatch.chdir(folder)
    program, given = shlex.split(command)[2], arguments(command)
    extra = list(small.get(program, []))
    if program == "ra_jax.train" and "config.toml" in command:
        extra = []  # the run's own settings, which are small
    elif program == "ra_jax.train" and "--aspect_ratio_buckets" not in given:
        extra += ["--aspect_ratio_buckets", "32,32"]
    elif program == "ra_jax.train":
        given[given.index("--aspect_ratio_buckets") + 1] = "32,32"
    if program == "ra_jax.train" and "--config" not in given and "--use_lora" not in given:
        extra.append("--use_lora")
    if program == "ra_jax.data" and "--latents" in given:
        given[given.index("--aspect_ratio_buckets") + 1] = "32,32"
        extra = [*base, "--mixed_precision", "no"]
    if "synth" in given:
        given[given.index("--scenes") + 1] = "2"
    PROGRAMS[program]([*given, *extra])


def score(file):
    """What a person does between two commands of the loop: add scores to every record."""
    records = json.loads(file.read_text())
    for i, record in enumerate(records):
        record["scores"] = dict.fromkeys(("removal_score", "background_score", "smoothness_score"), i % 4 / 4)
    file.write_text(json.dumps(records))


@pytest.mark.slow
def test_readmes_commands_run_one_after_another(desk, monkeypatch):
    folder, *_ = desk
    for command in (command for command in README if command in RUN):
        start(command, desk, monkeypatch)
        if "output/round_1" in command and "ra_jax.infer" in command:
            score(folder / "output" / "round_1" / "records.json")
        if "FLUX" not in command and "flux_fill" in command and "--output_dir" not in command:
            shutil.rmtree(folder / parse_output(command, folder))
    assert len(list((folder / "output" / "round_1").glob("*.png"))) == 4 * 6
    assert (folder / "output" / "evaluated" / "summary.json").exists()
    run_python_block(folder, desk)


def parse_output(command, folder):
    """The output folder that a training's configuration file names."""
    return re.search(r'output_dir = "([^"]+)"', (folder / arguments(command)[1]).read_text())[1]


def run_python_block(folder, desk):
    """Runs the Python example of README with the tiny models, and looks at what it promises."""
    _, base, _ = desk
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"))
    code = code.replace("black-forest-labs/FLUX.1-Fill-dev", base[1])
    code = code.replace("black-forest-labs/FLUX.1-Redux-dev", base[3]).replace(
        "num_inference_steps=28", "num_inference_steps=1"
    )
    shutil.copy(next((folder / "photos").iterdir()), folder / "photo.jpg")
    shutil.copy(next((folder / "masks").iterdir()), folder / "mask.png")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["out"].images) == 2 and names["out"].gates.shape == (2, 3)


@pytest.mark.slow
def test_packs_are_made_and_trained_on(desk, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    folder, *_ = desk
    for number, command in enumerate(PACKS):
        if "ra_jax.train" in command:
            command += f" --output_dir output/packed_{number}"
        start(command, desk, monkeypatch)
    assert (folder / "output" / "scenes" / "labeled_dict.json").exists()
