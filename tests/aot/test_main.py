"""`python -m ra_jax.aot`: figures of a step that is compiled but not run. Most tests compile for this CPU."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import topologies

from ra_jax.aot import __main__ as aot
from ra_jax.aot import topology
from ra_jax.aot.abstract_step import build_abstract_step, read_geometry, smaller_configs
from ra_jax.aot.topology import Chip, topology_devices
from ra_jax.config.parse import parse
from ra_jax.errors import ConfigError
from ra_jax.models.flops import attention_flops, expert_flops, forward_flops
from ra_jax.models.geometry import FLUX_FILL_DEV
from ra_jax.parallel.partitioner import MeshPartitioner
from ra_jax.parallel.partitioning import named_leaves

CHIP = Chip(peak_flops=1e9, memory=1e9, link_bandwidth=1e9)


@pytest.fixture
def flags(tiny_fill, tiny_redux):
    settings = {
        "pretrained_model_name_or_path": tiny_fill,
        "pretrained_redux_model_name_or_path": tiny_redux,
        "aspect_ratio_buckets": "32,32",
        "mixed_precision": "no",
        "gradient_checkpointing": "none",
        "max_sequence_length": 8,
        "num_experts": 3,
        "lora_rank": 2,
        "train_batch_size": 4,
    }
    return ["--use_lora", *(f"--{name}={value}" for name, value in settings.items())]


@pytest.fixture
def use_this_cpu(monkeypatch):
    """A function that makes every topology this CPU, with the figures of the given chip."""

    def use(chip: Chip):
        monkeypatch.setattr(topology, "topology_devices", lambda name: (jax.devices(), chip))

    return use


@pytest.fixture(autouse=True)
def restore_effort():
    """Restores the compiler's default effort, so that tests of other files do not depend on these."""
    yield
    aot.set_effort("full")


def test_efforts_set_an_option_of_the_installed_jax_and_full_is_its_default():
    names = ("jax_exec_time_optimization_effort", "jax_optimization_level")
    name = next(name for name in names if hasattr(jax.config, name))
    default = getattr(jax.config, name)
    aot.set_effort("quick")
    assert getattr(jax.config, name) != default
    aot.set_effort("full")
    assert getattr(jax.config, name) == default


def size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_the_figures_are_those_of_the_step(flags, use_this_cpu, tmp_path, capsys):
    use_this_cpu(CHIP)
    aot.main(["--topology", "v5e:1x1", "--json", str(tmp_path / "out.json"), *flags])
    figures = json.loads((tmp_path / "out.json").read_text())
    config = parse([*flags, "--train_json_path", "none", "--output_dir", "none"])
    step = build_abstract_step(config, jax.devices())
    state, frozen, batch = step.arguments
    total = size((state, frozen, batch))
    # Weights that a standard step does not use, such as the VAE's decoder, take no memory.
    assert total - size(frozen["vae"]) <= figures["argument_bytes"] * 1.001 <= total * 1.001
    forward = forward_flops(read_geometry(config).flux, image_tokens=2 * 32 * 32 // 8**2, context_tokens=8 + 4)
    shapes = {name: x.shape for name, x in named_leaves(state.trainable["flux"]).items()}
    experts = expert_flops(shapes, image_tokens=2 * 32 * 32 // 8**2, context_tokens=8 + 4)
    attention = attention_flops(read_geometry(config).flux, image_tokens=2 * 32 * 32 // 8**2, context_tokens=8 + 4)
    # 4 records: the forward pass, the gradient of activations (attention's products have two), and that of experts.
    assert figures["flops"] == pytest.approx(4 * (2 * forward + attention + 3 * experts))
    assert figures["compute_seconds"] == pytest.approx(figures["flops"] / CHIP.peak_flops)
    assert figures["collective_bytes"] == {} and figures["mfu_bound"] == 1.0 and figures["fits"]
    assert figures["total_bytes"] == figures["argument_bytes"] + figures["temporary_bytes"]
    assert "the step fits" in capsys.readouterr().out


def test_if_the_step_does_not_fit_smaller_configurations_are_tried(flags, use_this_cpu, monkeypatch, capsys):
    """Every compilation runs out of memory."""
    batch_shapes = []

    def compile_(self, step, state, frozen, batch):
        batch_shapes.append(batch["mask"].shape[:2])
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: ran out of memory")

    monkeypatch.setattr(MeshPartitioner, "compile", compile_)
    use_this_cpu(CHIP)
    with pytest.raises(SystemExit) as ended:
        aot.main(["--topology", "v5e:1x1", *flags])
    output = capsys.readouterr().out
    assert ended.value.code == 1 and batch_shapes == [(1, 4), (1, 4), (4, 1)]
    assert "does not fit: compilation needs more memory" in output and "trying --gradient_checkpointing full" in output
    assert "--train_batch_size 1 --gradient_accumulation_steps 4" in output
    assert "none of these configurations fits; use more chips, --base_precision int8" in output


def test_with_a_policy_gradient_checkpointing_points_is_tried_too(flags):
    human = ["--use_grpo", "--use_human_scores", "--enable_grpo_rewards", "--enable_grpo_loss"]
    config = parse([*flags, *human, "--train_json_path", "none", "--output_dir", "none"])
    assert [smaller.model.gradient_checkpointing for smaller in smaller_configs(config, 1)[:2]] == ["full", "points"]


def test_without_a_folder_only_the_sizes_of_flux_fill_are_known():
    places = ["--train_json_path", "none", "--output_dir", "none"]
    assert read_geometry(parse(places)) == FLUX_FILL_DEV
    with pytest.raises(ConfigError, match="someone/other: this folder does not exist, and only the sizes of"):
        read_geometry(parse([*places, "--pretrained_model_name_or_path", "someone/other"]))


def test_each_model_is_read_from_its_folder_or_built_in(flags, tiny_fill, tiny_redux):
    places = ["--train_json_path", "none", "--output_dir", "none"]
    fill = read_geometry(parse([*places, "--pretrained_model_name_or_path", str(tiny_fill)]))
    redux = read_geometry(parse([*places, "--pretrained_redux_model_name_or_path", str(tiny_redux)]))
    both = read_geometry(parse([*places, *flags]))
    assert (fill.flux, fill.vae, fill.vision) == (both.flux, both.vae, FLUX_FILL_DEV.vision)
    assert (redux.flux, redux.vision, redux.embedder) == (FLUX_FILL_DEV.flux, both.vision, both.embedder)


def test_the_largest_bucket_is_compiled(flags):
    buckets = ["--aspect_ratio_buckets", "32,32;32,64;48,32"]
    config = parse([*flags, *buckets, "--train_json_path", "none", "--output_dir", "none"])
    assert build_abstract_step(config, jax.devices()).arguments[2]["mask"].shape == (1, 4, 32, 64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--aspect_ratio_buckets", "foo"], "error: aspect_ratio_buckets .foo."),
        (["--aspect_ratio_buckets", "30,32"], "error: .*30"),
        (["--target_modules", "nothing"], "error: target_modules 'nothing' matches none"),
    ],
)
def test_wrong_flags_end_the_command_with_one_line(flags, use_this_cpu, wrong, message):
    use_this_cpu(CHIP)
    with pytest.raises(SystemExit, match=message):
        aot.main(["--topology", "v5e:1x1", *flags, *wrong])


def test_the_error_for_an_unknown_topology_lists_examples(monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"--topology v7:2x2: unknown; expected .* v5e:4x4.* v6e:2x4"):
        topology_devices("v7:2x2")
    with pytest.raises(ConfigError, match="--topology v5e:4x4x4: unknown"):
        topology_devices("v5e:4x4x4")
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs libtpu: pip install 'ra_jax\[tpu\]'"):
        topology_devices("v5e:4x4")
    with pytest.raises(SystemExit, match="error: --topology v7:2x2: unknown"):
        aot.main(["--topology", "v7:2x2"])


def test_a_topology_of_one_chip_gets_the_bounds_of_its_host(monkeypatch):
    calls = []

    def describe(**kwargs):
        calls.append(kwargs)
        return SimpleNamespace(devices=jax.devices())

    monkeypatch.setattr(os, "environ", {})  # because libtpu's settings are added to it
    monkeypatch.setattr(topology, "find_spec", lambda name: "installed")
    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    for name in ("v6e:1x1", "v5p:1x1x1", "v6e:2x4"):
        topology_devices(name)
    assert [call.get("chips_per_host_bounds") for call in calls] == [(1, 1, 1), (1, 1, 1), None]


def test_pmap_is_refused(flags, use_this_cpu):
    use_this_cpu(CHIP)
    with pytest.raises(SystemExit, match="aot compiles only for a mesh"):
        aot.main(["--topology", "v5e:1x1", *flags, "--parallelism", "pmap"])


@pytest.mark.parametrize(
    ("flag", "read", "output"),
    [
        ("train_json_path", "set.json", "set.json"),
        ("val_json_path", "set.json", "set.json"),
        ("init_experts_from", "run", "run/checkpoints/4/fits.json"),
        ("resume_from_checkpoint", "run/checkpoints/4", "run/checkpoints/4/fits.json"),
    ],
)
def test_figures_do_not_replace_an_input_of_the_training(tmp_path, monkeypatch, flag, read, output):
    monkeypatch.chdir(tmp_path)
    Path("run/checkpoints/4").mkdir(parents=True)
    Path("set.json").write_text("[]")
    with pytest.raises(SystemExit, match=f"error: --json: would write .*an input of --{flag}"):
        aot.main(["--topology", "v5e:1x1", "--use_lora", "--json", output, f"--{flag}", read])
    assert Path("set.json").read_text() == "[]" and not list(Path("run/checkpoints/4").iterdir())


@pytest.mark.parametrize("content", [b'{"topology": "v5e:1x1"}', b"[]", b"mine", b"\xff"])
def test_figures_do_not_replace_a_file_of_another_kind(tmp_path, content):
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=r"mine\.json: already exists, but is not the report of an earlier"):
        aot.main(["--topology", "v5e:1x1", "--json", str(file)])
    assert file.read_bytes() == content


def test_figures_do_not_replace_a_broken_link(tmp_path):
    (tmp_path / "link.json").symlink_to("later.json")
    with pytest.raises(SystemExit, match=r"error: --json.*link\.json"):
        aot.main(["--topology", "v5e:1x1", "--json", str(tmp_path / "link.json")])
    assert (tmp_path / "link.json").is_symlink()


def test_figures_replace_earlier_ones_beside_a_run(tmp_path, monkeypatch):
    (tmp_path / "checkpoints/4").mkdir(parents=True)
    (tmp_path / "fits.json").write_text('{"topology": "v5e:1x1", "fits": false}')
    report = {"topology": "v6e:1x1", "fits": True}
    monkeypatch.setattr(aot, "report", lambda *arguments: report)
    flags = ["--json", str(tmp_path / "fits.json"), "--use_lora", "--init_experts_from", str(tmp_path)]
    aot.main(["--topology", "v6e:1x1", *flags])
    assert json.loads((tmp_path / "fits.json").read_text()) == report
