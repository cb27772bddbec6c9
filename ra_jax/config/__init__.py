"""The configuration of a training run: settings with their ranges, checks for contradictions, and parsing.

Import from the submodules `settings`, `ranges`, `checks` and `parse`. In version 0.1 `ra_jax.config` was a single
module. Its names, listed below, can be imported from here until version 0.3. Therefore the attribute
`ra_jax.config.parse` is the function `parse`, and only `from ra_jax.config.parse import ...` reaches the module.
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
