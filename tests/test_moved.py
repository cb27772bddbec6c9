"""Old import paths: the names of version 0.1 at the module paths of version 0.1."""

import importlib
import importlib.util
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ra_jax
from ra_jax import errors
from ra_jax.moved import MOVED, REMOVAL_VERSION, RENAMED, install_old_paths
from ra_jax.rewards import image_metrics, registry, removal
from ra_jax.rewards.custom import parse_rewards

# Old module -> some of the names that it defined in 0.1.
NAMES = {
    "ra_jax.compile.hlo": "BITS SENT Instruction Program group_size",
    "ra_jax.compile.roofline": "Footprint Roofline",
    "ra_jax.compile.topology": "CHIPS Chip topology_devices",
    "ra_jax.compile.traced": "TracedStep batch_shapes geometry_of has_result largest_bucket smaller trace",
    "ra_jax.config_checks": "problems typed",
    "ra_jax.data.errors": "DataError Fault SHOWN_IN_FULL",
    "ra_jax.evaluation.contact_sheet": "captioned contact_sheet thumbnail",
    "ra_jax.evaluation.image_metrics": "decibels edge_difference erode gaussian_blur gradients inner_band laplacian mse"
    " outer_band psnr seam_band trimmed_psnr wasserstein",
    "ra_jax.models.loading": "LoadedEncoders LoadedModel encoders_fingerprint load_encoders load_fill_model",
    "ra_jax.models.partitioning": "AXES Placement axis_sizes batch_axes batch_shards parameter_name partition_spec",
    "ra_jax.models.weight_files": "StoredTensor WeightError stored_tensors write_tensors",
    "ra_jax.models.weight_tables": "FLUX REDUX SIGLIP VAE Rule Table",
    "ra_jax.models.weight_transfer": "Place fill store",
    "ra_jax.models.weights": "FLUX_SCHEDULER WeightError fingerprint load_flux load_redux load_vae read_configs"
    " read_redux_configs resolve save_fill_pipeline_config save_flux save_redux save_vae",
    "ra_jax.models.quantisation": "quantise",
    "ra_jax.rl.rewards": "REWARDS SCORES RegisteredReward RewardFunction RewardInputs background"
    " background_without_target default_rewards lpips register_reward remaining_object removal removal_without_target"
    " smoothness surroundings_likeness total_reward",
    "ra_jax.rl.user_rewards": "Reward RewardError UNTRACEABLE check_reward parse_rewards",
    "ra_jax.training.beginnings": "checkpoint_to_resume claim_output_dir first_weights resumed",
    "ra_jax.training.charts": "Axis Chart area_chart chart_data line_chart",
    "ra_jax.training.checkpoints": "About BEST CheckpointError Checkpoints find_checkpoint named_leaves read_about"
    " restore",
    "ra_jax.training.distributed": "check_address initialise is_speaker launched_by refuse_other_plans wait_for_all",
    "ra_jax.training.encoded": "Encoded encode",
    "ra_jax.training.experience": "Experience collect",
    "ra_jax.training.experts": "expert_configs",
    "ra_jax.training.generation": "RolloutSettings decode_panels reward_inputs roll_out_members",
    "ra_jax.training.launch": "Launch MeshLaunch PmapLaunch abstract compiled fetch forget_traces make_launch scalars"
    " trim_host_memory",
    "ra_jax.training.mesh": "all_mean all_sum check_batch check_heads check_width divisors make_mesh map_microbatches"
    " mean_gradients rows_of_process",
    "ra_jax.training.metrics": "FILE JsonLines TensorBoard Tracker WeightsAndBiases attention_flops expert_flops"
    " forward_flops open_trackers read_rows step_flops summarise",
    "ra_jax.training.objective": "Objective ObjectiveSettings",
    "ra_jax.training.preview_strip": "find_sheets preview_strip",
    "ra_jax.training.report": "plot_curves recorded_panels",
    "ra_jax.training.report_page": "write_report",
    "ra_jax.training.settings": "first_state flops_of_step model_options objective_settings policy_settings"
    " rollout_settings step_settings",
    "ra_jax.training.state": "TrainState init_state keys_for stream",
}
ERRORS = {
    "ra_jax.config": "ConfigError",
    "ra_jax.data.errors": "DataError",
    "ra_jax.data.records": "DataError",
    "ra_jax.models.lora": "TargetError",
    "ra_jax.models.weight_files": "WeightError",
    "ra_jax.models.weights": "WeightError",
    "ra_jax.rl.user_rewards": "RewardError",
    "ra_jax.training.checkpoints": "CheckpointError",
}


def run_python(*arguments, cwd):
    """Run Python in a subprocess in the folder `cwd`, and return its standard output and standard error."""
    process = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout, process.stderr


@pytest.fixture
def unload(monkeypatch):
    """A function that removes a module from `sys.modules` until the test ends, so that it is imported again."""

    def unload(name):
        monkeypatch.delitem(sys.modules, name, raising=False)

    return unload


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_modules_do_not_exist_and_new_ones_do():
    assert set(NAMES) == set(MOVED) - {"ra_jax.compile"}  # this package had no names
    for old, new in MOVED.items():
        assert importlib.util.find_spec(old).loader.__class__.__name__ == "MovedFinder"
        assert all(importlib.util.find_spec(name).origin.endswith(".py") for name in new) and not set(new) & set(MOVED)


def test_the_changelog_lists_the_old_and_the_new_path_of_each_module():
    text = (Path(__file__).parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| `([\w.]+)` \| ((?:`[\w.]+`(?:, )?)+) \|$", text)
    listed = {f"ra_jax.{old}": tuple(f"ra_jax.{name}" for name in re.findall(r"[\w.]+", new)) for old, new in rows}
    assert listed == {old: new for old, new in MOVED.items() if old != "ra_jax.compile"}


def test_old_paths_are_removed_in_the_version_that_their_warning_names():
    version, removal = (tuple(map(int, text.split(".")[:2])) for text in (ra_jax.__version__, REMOVAL_VERSION))
    assert version < removal, "remove ra_jax/moved.py, its tests and its line in ra_jax/__init__.py"


@pytest.mark.parametrize("old", NAMES)
def test_names_at_the_old_path_are_the_same_objects(old, unload):
    unload(old)
    with pytest.warns(FutureWarning) as warnings:
        module = importlib.import_module(old)
    text = f"{old} has moved to {' and '.join(MOVED[old])}; the old path will be removed in ra_jax 0.3"
    assert [str(warning.message) for warning in warnings] == [text]
    new_modules = [importlib.import_module(name) for name in MOVED[old]]
    for name in NAMES[old].split():
        value = getattr(module, name)
        assert any(getattr(new_module, RENAMED.get(name, name), None) is value for new_module in new_modules)
        # Functions and classes come from the module that defines them, not from one that imports them.
        defining_module = getattr(value, "__module__", None) or ""
        assert defining_module in MOVED[old] or not defining_module.startswith("ra_jax.")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("module", "name"), ERRORS.items())
def test_an_error_can_be_caught_by_its_class_at_the_old_path(module, name):
    old = getattr(importlib.import_module(module), name)
    assert old is getattr(errors, name)
    with pytest.raises(old, match="as it was"):
        raise getattr(errors, name)("as it was")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_renamed_function_has_its_old_name_at_the_old_path():
    module = importlib.import_module("ra_jax.evaluation.image_metrics")
    assert module.region_mean is image_metrics.masked_mean


def test_every_form_of_import_works_and_warns_at_its_line(tmp_path):
    (tmp_path / "imports.py").write_text(
        textwrap.dedent("""\
        import ra_jax.data.errors
        import ra_jax.evaluation.contact_sheet as sheet
        from ra_jax.compile import hlo
        from ra_jax.rl import rewards
        from ra_jax.rl.user_rewards import RewardError
        from ra_jax.training.checkpoints import *
        import ra_jax.errors

        assert ra_jax.data.errors.DataError is ra_jax.errors.DataError
        assert sheet.thumbnail.__module__ == "ra_jax.reporting.contact_sheet"
        assert hlo.Program.__module__ == "ra_jax.aot.hlo"
        assert rewards.total_reward.__module__ == "ra_jax.rewards.registry"
        assert "total_reward" in dir(rewards)
        assert RewardError is ra_jax.errors.RewardError and CheckpointError is ra_jax.errors.CheckpointError
        assert find_checkpoint.__module__ == "ra_jax.checkpoints"
        """)
    )
    stderr = run_python("-W", "always::FutureWarning", "imports.py", cwd=tmp_path)[1]
    lines = [int(line) for line in re.findall(r"imports\.py:(\d+): FutureWarning: ra_jax\.", stderr)]
    assert lines == [1, 2, 3, 3, 4, 5, 6]  # line 3 imports a package and its module


def test_new_modules_are_imported_only_when_a_name_is_accessed(tmp_path):
    code = """
import sys, ra_jax
assert not {"jax", "numpy"} & set(sys.modules)
import ra_jax.rl.rewards, ra_jax.training.launch
assert "ra_jax.rewards.registry" not in sys.modules and "ra_jax.parallel.partitioner" not in sys.modules
assert not hasattr(ra_jax.rl.rewards, "__wrapped__") and "ra_jax.rewards.registry" not in sys.modules
ra_jax.rl.rewards.REWARDS
assert "ra_jax.rewards.registry" in sys.modules and "ra_jax.parallel.partitioner" not in sys.modules
"""
    run_python("-c", code, cwd=tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_pickle_with_the_old_path_of_a_class_can_be_loaded():
    new_pickle = pickle.dumps(errors.RecordError("broken", record=3), protocol=0)
    old_pickle = new_pickle.replace(b"ra_jax.errors", b"ra_jax.data.errors")
    assert old_pickle != new_pickle and pickle.loads(old_pickle) == errors.RecordError("broken", record=3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_error_for_an_unknown_name_names_the_old_and_the_new_modules():
    with pytest.raises(ImportError, match=r"cannot import name 'removals' from 'ra_jax\.rl\.rewards' \(.*moved\.py\)"):
        from ra_jax.rl.rewards import removals  # noqa: F401
    text = (
        r"module 'ra_jax\.rl\.rewards', which has moved to ra_jax\.rewards\.registry and ra_jax\.rewards\.removal, has"
        r" no attribute 'removals'"
    )
    with pytest.raises(AttributeError, match=text):
        importlib.import_module("ra_jax.rl.rewards").removals  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'ra_jax\.rl\.reward'"):
        importlib.import_module("ra_jax.rl.reward")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_rewards_of_old_configurations_are_found():
    (reward,) = parse_rewards(["ra_jax.rl.rewards:remaining_object=0.5"], (0.4, 0.3, 0.3), True)
    assert (reward.function, reward.weight) == (removal.remaining_object, 0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_reward_registered_at_the_old_path_is_registered(monkeypatch):
    monkeypatch.setattr(registry, "REWARDS", dict(registry.REWARDS))
    importlib.import_module("ra_jax.rl.rewards").register_reward("all_alike", needs_target=False)(
        lambda inputs: inputs.image[:, 0, 0, 0]
    )
    assert "all_alike" in registry.REWARDS


def test_pytest_rewrites_assertions_of_tests_that_use_old_paths(tmp_path):
    (tmp_path / "test_users.py").write_text(
        "from ra_jax.rl.rewards import RewardInputs\n\n"
        "def test_it():\n    assert RewardInputs.__name__ == 'RewardInputs'\n"
    )
    out, _ = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_users.py", cwd=tmp_path)
    assert "1 passed" in out


def test_the_finder_is_installed_once():
    before = list(sys.meta_path)
    install_old_paths()
    assert sys.meta_path == before
