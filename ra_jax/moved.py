"""Old import paths of modules that have moved. They work until version `REMOVAL_VERSION`, with a warning.

`install_old_paths` appends one finder to `sys.meta_path`. The finder handles only the old paths of `MOVED`, and only if
no module has that name. A module at an old path is empty. It looks up its names in the new modules, and imports them
when the first name is accessed. Therefore classes and registries are the same objects at both paths.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

REMOVAL_VERSION = "0.3"

# Old module -> the modules that have its names now. They are searched in this order.
MOVED = {
    "ra_jax.compile": ("ra_jax.aot",),
    "ra_jax.compile.hlo": ("ra_jax.aot.hlo",),
    "ra_jax.compile.roofline": ("ra_jax.aot.roofline",),
    "ra_jax.compile.topology": ("ra_jax.aot.topology",),
    "ra_jax.compile.traced": ("ra_jax.aot.abstract_step",),
    "ra_jax.config_checks": ("ra_jax.config.checks", "ra_jax.config.parse", "ra_jax.errors"),
    "ra_jax.data.errors": ("ra_jax.errors",),
    "ra_jax.evaluation.contact_sheet": ("ra_jax.reporting.contact_sheet",),
    "ra_jax.evaluation.image_metrics": ("ra_jax.rewards.image_metrics",),
    "ra_jax.models.loading": ("ra_jax.interop.diffusers",),
    "ra_jax.models.quantisation": ("ra_jax.models.quantization",),
    "ra_jax.models.partitioning": ("ra_jax.parallel.partitioning",),
    "ra_jax.models.weight_files": ("ra_jax.interop.safetensors_io", "ra_jax.errors"),
    "ra_jax.models.weight_tables": ("ra_jax.interop.diffusers_tables",),
    "ra_jax.models.weight_transfer": ("ra_jax.interop.transfer",),
    "ra_jax.models.weights": ("ra_jax.interop.diffusers", "ra_jax.interop.hub", "ra_jax.errors"),
    "ra_jax.rl.rewards": ("ra_jax.rewards.registry", "ra_jax.rewards.removal"),
    "ra_jax.rl.user_rewards": ("ra_jax.rewards.custom", "ra_jax.errors"),
    "ra_jax.training.beginnings": ("ra_jax.training.resume", "ra_jax.run_folder"),
    "ra_jax.training.charts": ("ra_jax.reporting.charts",),
    "ra_jax.training.checkpoints": ("ra_jax.checkpoints", "ra_jax.parallel.partitioning", "ra_jax.errors"),
    "ra_jax.training.distributed": ("ra_jax.parallel.processes", "ra_jax.parallel.agreement"),
    "ra_jax.training.encoded": ("ra_jax.training.step.encode",),
    "ra_jax.training.experience": ("ra_jax.training.step.experience",),
    "ra_jax.training.experts": ("ra_jax.models.options",),
    "ra_jax.training.generation": ("ra_jax.training.step.generation", "ra_jax.training.step.settings"),
    "ra_jax.training.launch": ("ra_jax.parallel.partitioner", "ra_jax.parallel.compilation"),
    "ra_jax.training.mesh": ("ra_jax.parallel.mesh", "ra_jax.parallel.collectives"),
    "ra_jax.training.metrics": ("ra_jax.reporting.trackers", "ra_jax.training.flops", "ra_jax.models.flops"),
    "ra_jax.training.objective": ("ra_jax.training.step.objective", "ra_jax.training.step.settings"),
    "ra_jax.training.preview_strip": ("ra_jax.reporting.preview_strip",),
    "ra_jax.training.report": ("ra_jax.reporting.curves",),
    "ra_jax.training.report_page": ("ra_jax.reporting.page",),
    "ra_jax.training.settings": ("ra_jax.training.build", "ra_jax.models.options", "ra_jax.training.flops"),
    "ra_jax.training.state": ("ra_jax.training.step.state",),
}

# Names that have changed, too: name at the old path -> name in the new modules.
RENAMED = {
    "About": "CheckpointMetadata",
    "BEST": "BEST_DIR",
    "BITS": "DTYPE_BITS",
    "claim_output_dir": "prepare_output_dir",
    "collect": "collect_experience",
    "compiled": "compile_lowered",
    "Encoded": "EncodedBatch",
    "Fault": "RecordError",
    "FILE": "METRICS_FILE",
    "fill": "load_parameters",
    "captioned": "captioned_sheet",
    "recorded_panels": "recorded_charts",
    "first_state": "initial_state",
    "first_weights": "initial_params",
    "flops_of_step": "flops_from_config",
    "FLUX": "FLUX_TABLE",
    "FOLDER": "CHECKPOINT_DIR",
    "forget_traces": "clear_jit_caches",
    "geometry_of": "read_geometry",
    "has_result": "needs_result",
    "initialise": "initialize",
    "is_speaker": "is_main_process",
    "keys_for": "example_keys",
    "Launch": "Partitioner",
    "launched_by": "detect_launcher",
    "make_launch": "make_partitioner",
    "MeshLaunch": "MeshPartitioner",
    "Place": "PutParameter",
    "PmapLaunch": "PmapPartitioner",
    "problems": "find_problems",
    "quantise": "quantize",
    "read_about": "read_metadata",
    "REDUX": "REDUX_TABLE",
    "refuse_another_base": "check_base",
    "refuse_other_plans": "check_same_plan",
    "region_mean": "masked_mean",
    "resolve": "resolve_folder",
    "resumed": "restore_state",
    "roll_out_members": "generate_samples",
    "rows_of_process": "process_rows",
    "SENT": "RING_FACTORS",
    "SHOWN_IN_FULL": "MAX_ERRORS_SHOWN",
    "SIGLIP": "SIGLIP_TABLE",
    "smaller": "smaller_configs",
    "store": "save_parameters",
    "stream": "stream_key",
    "summarise": "summarize",
    "trace": "build_abstract_step",
    "TracedStep": "AbstractStep",
    "typed": "convert_setting",
    "VAE": "VAE_TABLE",
    "wait_for_all": "barrier",
}


class MovedFinder(MetaPathFinder, Loader):
    """Import finder and loader of the modules at the old paths of `MOVED`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module that has moved, or None for any other name."""
        if fullname not in MOVED:
            return None
        is_package = any(old.startswith(f"{fullname}.") for old in MOVED)
        spec = spec_from_loader(fullname, self, origin=__file__, is_package=is_package)
        spec.has_location = True  # then ImportError messages name this file, which has the table
        return spec

    def exec_module(self, module: ModuleType) -> None:
        """Make the module look up its names in the new modules, and warn at the line that imports it."""
        old = module.__name__
        new = MOVED[old]

        def list_names() -> list[str]:
            return sorted({name for module_name in new for name in dir(importlib.import_module(module_name))})

        def get_attribute(name: str) -> Any:
            if name == "__all__":
                return [public_name for public_name in list_names() if not public_name.startswith("_")]
            if not name.startswith("__"):  # only the import system and debuggers access such names
                new_name = RENAMED.get(name, name)
                for module_name in new:
                    new_module = importlib.import_module(module_name)
                    if hasattr(new_module, new_name):
                        return getattr(new_module, new_name)
            raise AttributeError(f"module {old!r}, which has moved to {' and '.join(new)}, has no attribute {name!r}")

        module.__getattr__, module.__dir__ = get_attribute, list_names
        warnings.warn(
            f"{old} has moved to {' and '.join(new)}; the old path will be removed in ra_jax {REMOVAL_VERSION}",
            FutureWarning,  # shown by default: the old paths exist for users' reward modules
            stacklevel=2,
        )


def install_old_paths() -> None:
    """Append the finder to `sys.meta_path`, once per process."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())
