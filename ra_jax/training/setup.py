"""Sets up a run: checks the configuration, the output folder and the data, and builds what the training loop needs.

The cheapest checks come first.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import jax
import optax

from ra_jax.config.parse import to_flat_dict
from ra_jax.config.settings import DEFAULT_REWARD_WEIGHTS, TrainConfig
from ra_jax.data.batch import Batch, Part, check_schema
from ra_jax.data.images import Size
from ra_jax.data.loader import Loader
from ra_jax.data.split import choose_scenes, shows_truth
from ra_jax.errors import ConfigError, RewardError
from ra_jax.flow.samplers import window_starts
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.interop.diffusers import FILL_SUBFOLDERS, LoadedModel, load_fill_model, read_configs
from ra_jax.interop.hub import resolve_folder
from ra_jax.models.blocks import unstack_blocks
from ra_jax.models.fill_model import Weights
from ra_jax.models.geometry import FillGeometry, abstract_fill_model
from ra_jax.models.options import model_options
from ra_jax.optimizers import build_optimizer
from ra_jax.parallel.agreement import check_same_plan, run_signature
from ra_jax.parallel.compilation import device_memory
from ra_jax.parallel.partitioner import Partitioner, make_partitioner
from ra_jax.parallel.processes import barrier, is_main_process
from ra_jax.rewards.custom import Reward, build_rewards
from ra_jax.rl.strength import PolicyStrength
from ra_jax.run_folder import check_run_outputs, prepare_output_dir
from ra_jax.training.build import initial_state, objective_settings, step_settings
from ra_jax.training.dataset import (
    RunData,
    batch_parts,
    load_run_data,
    single_record_loader,
    step_rows,
    training_loader,
)
from ra_jax.training.held_out import DriftGuard, HeldOut
from ra_jax.training.looks import Looks, LookSettings
from ra_jax.training.programs import CompiledSteps
from ra_jax.training.resume import (
    checkpoint_to_resume,
    initial_experts,
    initial_params,
    make_reference,
    restore_state,
    resumed_config,
    save_reference,
)
from ra_jax.training.step.objective import Objective
from ra_jax.training.step.settings import StepSettings
from ra_jax.training.step.state import TrainState
from ra_jax.training.step.train_step import make_train_step
from ra_jax.training.strength import (
    given_strength,
    loss_weights,
    strength_from_rollouts,
    strength_from_scores,
    warn_of_matching,
)

log = logging.getLogger(__name__)

MAX_HELD_OUT_RECORDS = 32  # drift is measured on at most this many records, each from a different scene


@dataclass(frozen=True)
class Setup:
    """Everything that the training loop needs.

    Attributes:
        config: the run's configuration. A resumed run may keep settings of before.
        output: the run's folder.
        partitioner: shards batches and weights over devices, and compiles steps.
        loaded: the model, with the shapes of its weights in place of the weights.
        frozen: the frozen weights, placed by the partitioner.
        loader: yields this process's rows of each batch.
        parts: the parts of the schema (`data.batch`) that the loader's batches have.
        num_microbatches: number of microbatches in a step.
        conditions_per_device: number of conditions of a microbatch that one device has.
        objective: the loss.
        optimizer: the optimizer.
        learning_rate: step number (from 0) -> learning rate.
        step_settings: settings of everything that a step does besides its loss.
        computes_rewards: step number (from 0) -> whether the step computes rewards.
        state: the train state, placed by the partitioner.
        initial_experts: the run with whose experts this run started, also if it is resumed; None for new experts.
        first_step: number of steps that were done before this start; greater than 0 only in a resumed run.
        total_steps: number of steps of the whole run.
        held_out: looks and drift, and what follows from them.
    """

    config: TrainConfig
    output: Path
    partitioner: Partitioner
    loaded: LoadedModel
    frozen: Weights
    loader: Loader
    parts: frozenset[Part]
    num_microbatches: int
    conditions_per_device: int
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    step_settings: StepSettings
    computes_rewards: Callable[[int], bool]
    state: TrainState
    initial_experts: str | None
    first_step: int
    total_steps: int
    held_out: HeldOut

    def compiled_steps(self) -> CompiledSteps:
        """Return the train step as compiled programs: one per bucket, and another one for steps without rewards."""

        def make_step(settings: StepSettings):
            return make_train_step(self.objective_for(settings), self.optimizer, settings)

        return CompiledSteps(
            make_step, self.step_settings, self.partitioner, self.conditions_per_device, self.computes_rewards
        )

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of this run's steps, placed by the partitioner.

        Steps run asynchronously: while the device computes a step, the host loads and transfers the next batch. The
        first batch is compared with the schema (`data.batch`).
        """
        batches = self.loader.iterate(self.first_step)
        first_batch = next(batches)
        check_schema(first_batch, self.parts)
        for batch in chain([first_batch], batches):
            yield self.partitioner.put_batch(batch, self.num_microbatches)

    def first_step_per_program(self) -> list[int]:
        """Return the first step with rewards and the first step without, because each kind needs its own program.

        Only steps from `first_step` on count. The list has one element if all of them are of the same kind.
        """
        first_steps = {}
        for step in range(self.first_step, self.total_steps):
            first_steps.setdefault(self.computes_rewards(step), step)
            if len(first_steps) == 2 or self.step_settings.rollouts is None:
                break
        return list(first_steps.values())

    def objective_for(self, settings: StepSettings) -> Objective:
        """Return the objective of a step with these settings.

        If the run has rollouts but this step has none, the objective has no policy loss, because there are no samples
        to learn from.
        """
        if self.step_settings.rollouts is None or settings.rollouts is not None:
            return self.objective
        return replace(self.objective, settings=replace(self.objective.settings, policy=None))


def set_up(config: TrainConfig) -> Setup:
    """Check the output folder and the data, load the model, and then write to the output folder.

    Raises UserError of any kind (ConfigError, DataError, WeightError, TargetError, RewardError, CheckpointError or
    OutputError). Its message says what was given, what was expected and what to do.
    """
    output = Path(config.run.output_dir)
    resume_from = checkpoint_to_resume(config, output)
    check_run_outputs(config, output, resume_from)
    config = resumed_config(config, resume_from)
    data = load_run_data(config)
    check_same_plan(run_signature(config, data.records, data.held_out, resume_from))
    partitioner = make_partitioner(config.parallel)
    rows = step_rows(config, partitioner)
    rewards = make_rewards(config, data.buckets, has_target=data.has_target)
    loaded = load_model(config, partitioner)
    check_same_plan({"base model": loaded.fingerprint})
    schedule = FlowSchedule.from_folder(loaded.folder)
    check_noisy_steps(config, data.buckets, schedule, loaded)
    warn_of_matching(config, data, schedule, loaded.model.size_multiple)
    loader = training_loader(config, data, loaded, rows)
    total_steps = config.total_steps(loader.batches_per_epoch * config.run.gradient_accumulation_steps)
    optimizer, learning_rate = build_optimizer(config.optimization, total_steps, config.updates)
    objective, step = Objective(loaded.model, schedule, objective_settings(config)), step_settings(config, rewards)
    trainable, weights = initial_params(config, loaded), loss_weights(config, has_results=data.has_target)
    reference = make_reference(config, trainable, resume_from)
    make_state = partial(initial_state, config, optimizer, strength=given_strength(config, weights))
    state, first_step = partitioner.init(make_state, trainable), 0
    if resume_from is not None:
        state, first_step = restore_state(resume_from, state, loaded.fingerprint, config, weights)
    elif state.strength is not None:
        with partitioner.scope():
            state = replace(state, strength=choose_initial_strength(config, data, loaded, objective, step, state))
    looks = make_looks(config, output, data, loaded, schedule)
    held_out = HeldOut(looks, make_guard(config, data, loaded, objective), config.run.patience)
    held_out.restore(output, first_step)
    prepare_output_dir_once(config, output, keep=resume_from is not None)
    loaded = add_reference(config, output, loaded, reference, partitioner)
    return Setup(
        config=config,
        output=output,
        partitioner=partitioner,
        loaded=without_arrays(loaded),
        frozen=partitioner.shard(prepare_frozen(loaded.frozen)),
        loader=loader,
        parts=batch_parts(config, results=data.has_target, latents=data.latents),
        num_microbatches=config.run.gradient_accumulation_steps,
        conditions_per_device=config.run.train_batch_size // partitioner.shards,
        objective=objective,
        optimizer=optimizer,
        learning_rate=learning_rate,
        step_settings=step,
        computes_rewards=config.rollouts.due,
        state=partitioner.shard(state),
        initial_experts=initial_experts(config, resume_from),
        first_step=first_step,
        total_steps=total_steps,
        held_out=held_out,
    )


def without_arrays(loaded: LoadedModel) -> LoadedModel:
    """Replace the weights by their shapes; the arrays would be a second copy in memory."""
    trainable, frozen = jax.eval_shape(lambda *x: x, loaded.trainable, loaded.frozen)
    return replace(loaded, trainable=trainable, frozen=frozen)


def add_reference(
    config: TrainConfig, output: Path, loaded: LoadedModel, reference: Weights | None, partitioner: Partitioner
) -> LoadedModel:
    """Add the weights of the reference to the frozen weights, and keep those of experts in the run's folder."""
    if reference is None:
        return loaded
    if config.experts.use_lora:
        # As checkpoints are saved: with several processes, Orbax takes no array that only one of them knows.
        shared = partitioner.unshard(partitioner.shard(reference))
        save_reference(output, shared, loaded.fingerprint, to_flat_dict(config))
    return replace(loaded, frozen=loaded.frozen | {"reference": reference})


def prepare_output_dir_once(config: TrainConfig, output: Path, *, keep: bool) -> None:
    """Let process 0 run `prepare_output_dir` after all processes have passed their checks."""
    barrier("checks passed")  # a check after the write would take the new config.toml for another run's
    if is_main_process():
        prepare_output_dir(config, output, keep=keep)
    barrier("output folder prepared")


def prepare_frozen(frozen: Weights) -> Weights:
    """Return the frozen weights in the form that steps use.

    On a single CPU device, the stacked arrays of the transformer are split into one array per block
    (`unstack_blocks`). On all other devices the weights stay unchanged.
    """
    if jax.device_count() == 1 and jax.default_backend() == "cpu":
        return frozen | {"flux": unstack_blocks(frozen["flux"])}
    return frozen


def check_fits(config: TrainConfig, geometry: FillGeometry) -> None:
    """Raise ConfigError if all weights do not fit one device. Under pmap every device has a copy of all weights."""
    _, *weights = abstract_fill_model(geometry, model_options(config), attention="xla")
    weights.append(jax.eval_shape(partial(make_reference, config, resume_from=None), weights[0]))
    required, available = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights)), device_memory()
    if required > available:
        raise ConfigError(
            f"--parallelism pmap keeps all weights ({required / 1e9:.1f} GB) on each device, and a device has "
            f"{available / 1e9:.1f} GB: leave --parallelism out, and shard the weights over a mesh with --mesh_fsdp "
            f"{jax.device_count()}"
        )


def load_model(config: TrainConfig, partitioner: Partitioner) -> LoadedModel:
    """Load the base and create experts and router, or load the base alone if the whole transformer is trained.

    Raises ConfigError, before any weights are read, if the partitioner cannot shard a transformer of this size.
    """
    fill = config.model.pretrained_model_name_or_path
    geometry = FillGeometry(*read_configs(resolve_folder(fill, FILL_SUBFOLDERS), None))
    partitioner.check(heads=geometry.flux.num_attention_heads, width=geometry.flux.inner_dim)
    if config.parallel.parallelism == "pmap":
        check_fits(config, geometry)
    return load_fill_model(
        fill,
        config.model.pretrained_redux_model_name_or_path,
        model_options(config),
        seed=config.run.seed,
        placement=partitioner.placement,
    )


def make_rewards(config: TrainConfig, buckets: Sequence[Size], *, has_target: bool) -> tuple[Reward, ...]:
    """Build the rewards of automatic mode (`build_rewards`); empty in the other modes."""
    if config.mode != "automatic":
        return ()
    specs, batch_size = config.rollouts.reward_functions, config.run.train_batch_size
    return build_rewards(specs, config.grpo.reward_weights, buckets, batch_size, has_target=has_target)


def choose_initial_strength(
    config: TrainConfig,
    data: RunData,
    loaded: LoadedModel,
    objective: Objective,
    step: StepSettings,
    state: TrainState,
) -> PolicyStrength:
    """Choose the strength of the policy from the scores of the records, or from rollouts in automatic mode.

    The rollouts are of held-out scenes if the rewards fit them: rewards that compare with a result need records that
    have one.
    """
    if config.mode == "human":
        return strength_from_scores(config, data)
    fit = (data.held_out[0].result is not None) == data.has_target
    records = data.held_out if fit else data.records
    records = choose_scenes(records, config.grpo.reward_weights, config.logging.validation_scenes)
    loader = single_record_loader(config, records, loaded)
    return strength_from_rollouts(config, objective, step.rollouts, loader, state, loaded.frozen)


def check_noisy_steps(config: TrainConfig, buckets: Sequence[Size], schedule: FlowSchedule, loaded: LoadedModel):
    """Raise ConfigError if the stochastic sampler has too few steps for its window of noisy steps."""
    if config.mode != "automatic" or config.grpo.estimator != "sde":
        return
    steps, window = config.rollouts.rollout_steps, config.rollouts.sde_window
    for height, width in buckets:
        tokens = 2 * height * width // loaded.model.size_multiple**2
        if not len(window_starts(schedule.sampling_times(steps, tokens), window)):
            raise ConfigError(
                f"rollout_steps = {steps} with sde_window = {window}: with panels of {height},{width} no window of "
                "that many noisy steps can start after step 0, in the noisier half and at t <= 0.9; raise "
                "--rollout_steps (8 is usual) or lower --sde_window"
            )


def make_looks(
    config: TrainConfig, output: Path, data: RunData, loaded: LoadedModel, schedule: FlowSchedule
) -> Looks | None:
    """Build the looks at some held-out scenes; None with `--validation_steps 0`.

    Removals are compared with the ground truth if the records of all these scenes have it. If not, they are scored by
    the rewards of the run (automatic mode), or by the rewards that need no ground truth. If no scene is held out, they
    are not scored.
    """
    if not config.logging.validation_steps:
        return None
    weights, logging_config = config.grpo.reward_weights, config.logging
    records = choose_scenes(data.held_out, weights, logging_config.validation_scenes)
    with_truth = all(map(shows_truth, records))
    specs = config.rollouts.reward_functions if config.mode == "automatic" and not with_truth else ()
    # All weights may be 0 in runs that learn from no scores, or from other rewards.
    default_weights = weights if any(weights) else DEFAULT_REWARD_WEIGHTS
    rewards = ()
    if data.is_held_out:
        try:
            own_weights = weights if specs else default_weights
            rewards = build_rewards(specs, own_weights, data.buckets, 1, has_target=with_truth)
        except RewardError as error:  # the run's own rewards need a truth that the held-out records do not have
            log.warning("held_out_reward is computed by the rewards without ground truth: %s", error)
            rewards = build_rewards((), default_weights, data.buckets, 1, has_target=False)
    settings = LookSettings(
        num_inference_steps=logging_config.num_inference_steps,
        guidance_scale=config.model.guidance_scale,
        num_previews=logging_config.num_validation_images,
        rewards=rewards,
        with_truth=with_truth,
        seed=config.run.seed,
    )
    return Looks(output, loaded.model, schedule, single_record_loader(config, records, loaded), settings)


def make_guard(config: TrainConfig, data: RunData, loaded: LoadedModel, objective: Objective) -> DriftGuard | None:
    """Build the drift guard, which measures on some held-out records; None if --max_drift is not given."""
    if config.run.max_drift is None:
        return None
    records = choose_scenes(data.held_out, config.grpo.reward_weights, MAX_HELD_OUT_RECORDS)
    loader = single_record_loader(config, records, loaded)
    return DriftGuard(objective, loader, limit=config.run.max_drift, seed=config.run.seed)
