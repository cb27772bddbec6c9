"""Builds the train step of a configuration for a mesh, with abstract arguments: shapes, dtypes and shardings only."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ra_jax.config.settings import TrainConfig
from ra_jax.data.batch import batch_fields
from ra_jax.data.images import Size
from ra_jax.data.loader import check_buckets, parse_buckets
from ra_jax.errors import ConfigError
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.interop.diffusers import read_configs, read_redux_configs
from ra_jax.models.attention import implementation_for
from ra_jax.models.geometry import FLUX_FILL_DEV, FillGeometry, abstract_fill_model
from ra_jax.models.options import model_options
from ra_jax.optimizers import build_optimizer
from ra_jax.parallel.mesh import check_batch, make_mesh
from ra_jax.parallel.partitioner import MeshPartitioner
from ra_jax.parallel.partitioning import BATCH
from ra_jax.rewards.custom import parse_rewards
from ra_jax.training.build import initial_state, objective_settings, step_settings
from ra_jax.training.dataset import batch_parts
from ra_jax.training.flops import ModelSizes, flops_from_config
from ra_jax.training.resume import make_reference
from ra_jax.training.step.objective import Objective
from ra_jax.training.step.settings import StepSettings
from ra_jax.training.step.train_step import make_train_step
from ra_jax.training.strength import given_strength, loss_weights

# Flag -> the only hub model that the flag may name here. `FLUX_FILL_DEV` has the sizes of both models.
KNOWN_MODELS = {
    "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-Fill-dev",
    "pretrained_redux_model_name_or_path": "black-forest-labs/FLUX.1-Redux-dev",
}


@dataclass(frozen=True)
class AbstractStep:
    """A train step, and the shapes and shardings of its arguments on a mesh.

    Attributes:
        partitioner: compiles the step for the mesh.
        objective: the loss.
        optimizer: the optimizer.
        settings: the static settings of the step.
        arguments: (train state, frozen weights, batch), with `jax.ShapeDtypeStruct`s for arrays.
        flops: model FLOPs of one step over all chips (`models.flops.step_flops`).
        base_bytes: bytes of the frozen transformer, over all chips.
    """

    partitioner: MeshPartitioner
    objective: Objective
    optimizer: optax.GradientTransformation
    settings: StepSettings
    arguments: tuple
    flops: float
    base_bytes: int

    def compile(self) -> jax.stages.Compiled:
        """Compile the step for this mesh."""
        step = make_train_step(self.objective, self.optimizer, self.settings)
        return self.partitioner.compile(step, *self.arguments)


def read_geometry(config: TrainConfig) -> FillGeometry:
    """Return the sizes of the models that the configuration names.

    For a local folder, the sizes are read from its configs. The sizes of FLUX.1-Fill-dev and FLUX.1-Redux-dev are built
    in.

    Raises:
        ConfigError: a model is neither a local folder nor one of these two.
    """
    fill, redux = (getattr(config.model, name) for name in KNOWN_MODELS)
    for name, model in zip(KNOWN_MODELS, (fill, redux), strict=True):
        if not Path(model).is_dir() and model != (known := KNOWN_MODELS[name]):
            raise ConfigError(
                f"{name} = {model}: this folder does not exist, and only the sizes of {known} are built in; give a "
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


def build_abstract_step(config: TrainConfig, devices: list[jax.Device]) -> AbstractStep:
    """Build the configuration's train step for its largest bucket on a mesh of `devices`, without compiling it.

    Raises:
        ConfigError: mesh, batch size and number of devices do not fit together, parallelism is not "mesh", or the
            sizes of a model are not known.
        DataError: `aspect_ratio_buckets` is malformed, or one of its panel sizes does not fit the model.
    """
    if config.parallel.parallelism != "mesh":
        raise ConfigError("--parallelism pmap: python -m ra_jax.aot compiles only for a mesh; remove this flag")
    parallel, platform = config.parallel, devices[0].platform
    partitioner = MeshPartitioner(
        make_mesh(parallel.mesh_data, parallel.mesh_fsdp, parallel.mesh_tensor, devices=devices)
    )
    check_batch(partitioner.mesh, config.run.train_batch_size)
    geometry = read_geometry(config)
    partitioner.check(heads=geometry.flux.num_attention_heads, width=geometry.flux.inner_dim)
    options = model_options(config)
    attention = implementation_for(
        platform, dtype=options.dtype, head_dim=geometry.flux.attention_head_dim, devices=len(devices)
    )
    model, trainable, frozen = abstract_fill_model(geometry, options, attention=attention)
    check_buckets(parse_buckets(config.data.aspect_ratio_buckets), model.size_multiple)
    optimizer, _ = build_optimizer(config.optimization, config.run.max_train_steps or 1000, config.updates)
    has_results = needs_result(config)
    strength = given_strength(config, loss_weights(config, has_results=has_results))
    state = jax.eval_shape(partial(initial_state, config, optimizer, strength=strength), trainable)
    reference = jax.eval_shape(partial(make_reference, config, resume_from=None), trainable)
    if reference is not None:
        frozen |= {"reference": reference}
    rewards = ()
    if config.mode == "automatic":
        rewards = parse_rewards(config.rollouts.reward_functions, config.grpo.reward_weights, has_results)
    settings = step_settings(config, rewards)
    objective = Objective(model, FlowSchedule(), objective_settings(config))
    batch = batch_shapes(config, geometry)

    def with_shardings(tree):
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
            partitioner.placement.shardings(tree),
        )

    batch_sharding = NamedSharding(partitioner.mesh, P(None, BATCH))
    sizes = ModelSizes(geometry.flux, trainable["flux"], model.size_multiple, geometry.image_tokens)
    return AbstractStep(
        partitioner,
        objective,
        optimizer,
        settings,
        arguments=(
            with_shardings(state),
            with_shardings(frozen),
            {name: x.update(sharding=batch_sharding) for name, x in batch.items()},
        ),
        flops=flops_from_config(config, sizes, batch, step=0),
        base_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen["flux"])),
    )


def largest_bucket(config: TrainConfig) -> Size:
    """Return the panel size with the largest area. Its step needs the most memory."""
    return max(parse_buckets(config.data.aspect_ratio_buckets), key=math.prod)


def needs_result(config: TrainConfig) -> bool:
    """Return whether records need a result image. Only automatic mode without a base loss needs none."""
    return config.mode != "automatic" or config.losses.base_loss_weight > 0


def batch_shapes(config: TrainConfig, geometry: FillGeometry) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and the dtype of each array of a step's batch, in the largest bucket.

    Shapes are [A, B, ...], with A = `gradient_accumulation_steps` and B = `train_batch_size`.
    """
    height, width = largest_bucket(config)
    sizes = {"B": config.run.train_batch_size, "h": height, "w": width}
    parts = batch_parts(config, results=needs_result(config), latents=False)
    if geometry.vision is None:
        parts -= {"redux"}
    else:
        sizes["s"] = geometry.vision.image_size
    return {
        name: jax.ShapeDtypeStruct((config.run.gradient_accumulation_steps, *field.shape_for(sizes)), field.dtypes[0])
        for name, field in batch_fields(parts).items()
    }


def smaller_configs(config: TrainConfig, num_devices: int) -> list[TrainConfig]:
    """Return up to four configurations that need less and less memory per chip, for when `config` does not fit.

    Each configuration adds one change to the one before it. The changes are, in this order:

    1. The weights are sharded over all chips.
    2. All activations of a block are recomputed (gradient_checkpointing full).
    3. With a policy loss, its timesteps are also processed one after another (gradient_checkpointing points).
    4. Microbatches become smaller, and there are more of them.
    """
    parallel, run, configs = config.parallel, config.run, []
    if parallel.mesh_fsdp * parallel.mesh_tensor < num_devices:
        config = replace(config, parallel=replace(parallel, mesh_data=1, mesh_fsdp=num_devices // parallel.mesh_tensor))
        configs.append(config)
    for remat in ("full", "points") if config.uses_policy else ("full",):
        if config.model.gradient_checkpointing not in (remat, "points"):
            config = replace(config, model=replace(config.model, gradient_checkpointing=remat))
            configs.append(config)
    shards = num_devices // parallel.mesh_tensor
    if run.train_batch_size > shards:
        accumulation = run.gradient_accumulation_steps * (run.train_batch_size // shards)
        run = replace(run, train_batch_size=shards, gradient_accumulation_steps=accumulation)
        configs.append(replace(config, run=run))
    return configs
