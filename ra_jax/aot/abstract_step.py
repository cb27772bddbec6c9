"""The train step of a configuration for devices that are not there: everything but arrays."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ra_jax.config.settings import TrainConfig
from ra_jax.data.images import Size
from ra_jax.data.loader import check_buckets, parse_buckets
from ra_jax.errors import ConfigError
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.interop.diffusers import read_configs, read_redux_configs
from ra_jax.models.attention import implementation_for
from ra_jax.models.fill_model import FillModel
from ra_jax.models.geometry import FLUX_FILL_DEV, FillGeometry, abstract_fill_model
from ra_jax.models.options import model_options
from ra_jax.parallel.mesh import check_batch, make_mesh
from ra_jax.parallel.partitioner import MeshLaunch
from ra_jax.parallel.partitioning import BATCH
from ra_jax.rewards.custom import parse_rewards
from ra_jax.training.build import first_state, objective_settings, step_settings
from ra_jax.training.flops import flops_of_step
from ra_jax.training.optimizers import build_optimizer
from ra_jax.training.step.objective import Objective
from ra_jax.training.step.train_step import StepSettings, make_train_step

KNOWN = {  # whose sizes `FLUX_FILL_DEV` has, by the flag that names them
    "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-Fill-dev",
    "pretrained_redux_model_name_or_path": "black-forest-labs/FLUX.1-Redux-dev",
}


@dataclass(frozen=True)
class TracedStep:
    """A step, and its arguments' shapes on a mesh: state, frozen weights, batch. flops: that its mathematics needs,
    over all chips (`metrics.step_flops`); weights: bytes of the base."""

    launch: MeshLaunch
    objective: Objective
    optimizer: optax.GradientTransformation
    settings: StepSettings
    arguments: tuple
    flops: float
    weights: int

    def compile(self) -> jax.stages.Compiled:
        step = make_train_step(self.objective, self.optimizer, self.settings)
        return self.launch.compile(step, *self.arguments)


def geometry_of(config: TrainConfig) -> FillGeometry:
    """Of the models that the configuration names: each read from its folder, or known, for FLUX.1-Fill-dev and
    FLUX.1-Redux-dev.

    Raises ConfigError for a model on the hub whose sizes are not known here.
    """
    fill, redux = (getattr(config.model, name) for name in KNOWN)
    for name, model in zip(KNOWN, (fill, redux), strict=True):
        if not Path(model).is_dir() and model != (known := KNOWN[name]):
            raise ConfigError(
                f"{name} = {model}: no folder here, and only the sizes of {known} are known without its files; give a "
                "folder in diffusers' layout"
            )
    geometry = FLUX_FILL_DEV
    if Path(fill).is_dir():
        flux, vae, *_ = read_configs(fill, None)
        geometry = replace(geometry, flux=flux, vae=vae)
    if Path(redux).is_dir():
        vision, embedder = read_redux_configs(redux)
        geometry = replace(geometry, vision=vision, embedder=embedder)
    return geometry


def trace(config: TrainConfig, devices: list[jax.Device]) -> TracedStep:
    """The configuration's train step on a mesh of these devices, for its largest bucket. Nothing is compiled yet.

    Raises ConfigError where mesh, batch and devices do not fit each other, DataError for buckets that are none.
    """
    if config.parallel.parallelism != "mesh":
        raise ConfigError("--parallelism pmap: aot compiles for a mesh; leave it out")
    parallel, platform = config.parallel, devices[0].platform
    launch = MeshLaunch(make_mesh(parallel.mesh_data, parallel.mesh_fsdp, parallel.mesh_tensor, devices=devices))
    check_batch(launch.mesh, config.run.train_batch_size)
    geometry = geometry_of(config)
    launch.check(heads=geometry.flux.num_attention_heads, width=geometry.flux.inner_dim)
    options = model_options(config)
    attention = implementation_for(
        platform, dtype=options["dtype"], head_dim=geometry.flux.attention_head_dim, devices=len(devices)
    )
    model, trainable, frozen = abstract_fill_model(geometry, attention=attention, **options)
    check_buckets(parse_buckets(config.data.aspect_ratio_buckets), model.multiple)
    optimizer, _ = build_optimizer(config.optimization, config.run.max_train_steps or 1000, config.updates)
    state = jax.eval_shape(partial(first_state, config, optimizer), trainable)
    rewards = ()
    if config.mode == "automatic":
        rewards = parse_rewards(config.rollouts.reward_functions, config.grpo.reward_weights, has_result(config))
    settings = step_settings(config, rewards)
    objective = Objective(model, FlowSchedule(), objective_settings(config))
    batch = batch_shapes(config, model, geometry)

    def placed(tree):
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            tree,
            launch.placement.shardings(tree),
        )

    by_record = NamedSharding(launch.mesh, P(None, BATCH))
    return TracedStep(
        launch,
        objective,
        optimizer,
        settings,
        (placed(state), placed(frozen), {name: x.update(sharding=by_record) for name, x in batch.items()}),
        flops=flops_of_step(config, geometry.flux, trainable, model.multiple, geometry.image_tokens, batch, step=0),
        weights=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen["flux"])),
    )


def largest_bucket(config: TrainConfig) -> Size:
    """Panels of the step that needs most memory."""
    return max(parse_buckets(config.data.aspect_ratio_buckets), key=math.prod)


def has_result(config: TrainConfig) -> bool:
    """Whether records bring results: all but those of rewards alone."""
    return config.mode != "automatic" or config.losses.base_loss_weight > 0


def batch_shapes(config: TrainConfig, model: FillModel, geometry: FillGeometry) -> dict[str, jax.ShapeDtypeStruct]:
    """What the loader brings to a step, [A, B, ...], in the largest bucket."""
    height, width = largest_bucket(config)
    rows = (config.run.gradient_accumulation_steps, config.run.train_batch_size)

    def of(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*rows, *shape), dtype)

    batch = {name: of(np.uint8, height, width, 3) for name in ("source", "reference")}
    batch |= {"mask": of(np.uint8, height, width)}
    if has_result(config):
        batch["result"] = of(np.uint8, height, width, 3)
    if geometry.vision is not None:
        size = geometry.vision.image_size
        batch["redux_pixels"] = of(np.float32, size, size, 3)
    batch |= {name: of(np.int32) for name in ("group_id", "record_id", "epoch")}
    batch |= {name: of(np.float32) for name in ("condition_weight", "imitation_weight")}
    if config.mode == "human" and config.grpo.enable_grpo_rewards:
        batch |= {"scores": of(np.float32, 3)}
        batch |= {name: of(np.float32) for name in ("reward", "advantage", "group_reward_std", "dead_group")}
    return batch


def smaller(config: TrainConfig, devices: int) -> list[TrainConfig]:
    """What may fit where this configuration does not, few tries, each with what came before."""
    parallel, run, found = config.parallel, config.run, []
    if parallel.mesh_fsdp * parallel.mesh_tensor < devices:
        config = replace(config, parallel=replace(parallel, mesh_data=1, mesh_fsdp=devices // parallel.mesh_tensor))
        found.append(config)
    for remat in ("full", "points") if config.uses_policy else ("full",):
        if config.model.gradient_checkpointing not in (remat, "points"):
            config = replace(config, model=replace(config.model, gradient_checkpointing=remat))
            found.append(config)
    shards = devices // parallel.mesh_tensor
    if run.train_batch_size > shards:
        accumulation = run.gradient_accumulation_steps * (run.train_batch_size // shards)
        run = replace(run, train_batch_size=shards, gradient_accumulation_steps=accumulation)
        found.append(replace(config, run=run))
    return found
