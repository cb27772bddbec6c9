"""The configuration of a training: groups of settings with their ranges, contradictions, and where values come from.

Import from the submodules `settings`, `ranges`, `checks` and `parse`. The names below were those of the single module
`ra_jax.config` of version 0.1; they stay importable from here until version 0.3. The attribute `ra_jax.config.parse` is
therefore the function; `from ra_jax.config.parse import ...` reaches the module.
"""

from ra_jax.config.parse import from_checkpoint, from_flat_dict, load_toml, parse, to_flat_dict, to_toml
from ra_jax.config.settings import (
    DataConfig,
    ExpertsConfig,
    GRPOConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from ra_jax.errors import ConfigError

__all__ = [
    "ConfigError",
    "DataConfig",
    "ExpertsConfig",
    "GRPOConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizationConfig",
    "ParallelConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainConfig",
    "from_checkpoint",
    "from_flat_dict",
    "load_toml",
    "parse",
    "to_flat_dict",
    "to_toml",
]
