"""Measure the time of each part of an automatic GRPO step, and the memory of the step by group size.

    python scripts/benchmarks/step.py [--config configs/tiny_auto.toml] [--rounds 12] [--groups 2 4 8 16]
    python scripts/benchmarks/step.py --config configs/flux_fill_auto.toml --random_weights --rounds 2 --groups \\
        --gradient_accumulation_steps 1         at the sizes of FLUX.1-Fill, on a GPU with 140 GB

Compiles encoding, rollout, decoding, rewards and update separately, runs them in turn, and prints the median time and
the share of each. Then compiles the whole step for several --num_generations, and prints its temporary memory and the
size of the rollouts' latents.

The data and the models of the configuration must exist; `python -m ra_jax.demo` makes those of the default. With
--random_weights none are read: weights and photos are random, the whole step is not compiled, and --groups must be
empty.
"""

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from ra_jax.aot.abstract_step import build_abstract_step
from ra_jax.config.parse import from_flat_dict, load_toml
from ra_jax.config.settings import TrainConfig
from ra_jax.data.batch import Batch
from ra_jax.models.fill_model import Weights
from ra_jax.models.geometry import random_weights
from ra_jax.parallel.compilation import program_memory
from ra_jax.training.build import initial_state
from ra_jax.training.setup import Setup, set_up
from ra_jax.training.step.encode import LossContext, encode
from ra_jax.training.step.experience import Experience, collect_experience
from ra_jax.training.step.generation import decode_panels, generate_samples, reward_inputs, score
from ra_jax.training.step.objective import Objective
from ra_jax.training.step.settings import StepSettings
from ra_jax.training.step.state import TrainState
from ra_jax.training.step.train_step import StepDefinition, learn, make_train_step
from ra_jax.training.strength import given_strength, loss_weights


@dataclass(frozen=True)
class Measurement:
    """Settings of the measurement."""

    config: Path = Path("configs/tiny_auto.toml")  # configuration of an automatic run
    rounds: int = 12  # runs of each part; the first is not counted
    groups: tuple[int, ...] = (2, 4, 8, 16)  # values of --num_generations in the table of memory
    random_weights: bool = False  # draw weights and photos at random instead of reading them
    gradient_accumulation_steps: int | None = None  # replaces the value of the configuration


@dataclass(frozen=True)
class Step:
    """The parts and the inputs of a training step."""

    objective: Objective
    optimizer: optax.GradientTransformation
    settings: StepSettings
    state: TrainState
    frozen: Weights
    batch: Batch

    @classmethod
    def from_setup(cls, setup: Setup) -> "Step":
        """Return the step of a training that is set up, with its first batch."""
        batch = next(setup.batches())
        return cls(setup.objective, setup.optimizer, setup.step_settings, setup.state, setup.frozen, batch)

    @classmethod
    def from_config(cls, config: TrainConfig) -> "Step":
        """Return the step of a configuration, with random weights and a random batch."""
        abstract_step = build_abstract_step(config, jax.devices()[:1])
        state, frozen, batch = abstract_step.arguments
        trainable, frozen = random_weights((state.trainable, frozen), jax.random.key(0))
        strength = given_strength(config, loss_weights(config, has_results="result" in batch))
        batch = {name: draw_field(name, x) for name, x in batch.items()}
        state = jax.jit(partial(initial_state, config, abstract_step.optimizer, strength=strength))(trainable)
        optimizer, settings = abstract_step.optimizer, abstract_step.settings
        return cls(abstract_step.objective, optimizer, settings, state, frozen, batch)


def draw_field(name: str, x: jax.ShapeDtypeStruct) -> jax.Array:
    """Draw a field of a batch.

    Photos are noise, masks cover the upper half, ids are all different, weights are 1.
    """
    rng = np.random.default_rng(len(name))
    if name == "mask":
        return jnp.zeros(x.shape, x.dtype).at[..., : x.shape[-2] // 2, :].set(1)
    if x.dtype == np.uint8:
        return jnp.asarray(rng.integers(256, size=x.shape), x.dtype)
    if x.dtype == np.int32:
        return jnp.arange(np.prod(x.shape), dtype=x.dtype).reshape(x.shape)
    return jnp.asarray(rng.normal(size=x.shape) if len(x.shape) > 2 else np.ones(x.shape), x.dtype)


def make_config(measurement: Measurement, folder: str, **changes) -> TrainConfig:
    """Return the configuration of the measured run with `changes`; its output folder is `folder`."""
    settings = {"output_dir": folder, "overwrite_output_dir": True, "report_to": ["none"], "validation_steps": 0}
    if measurement.gradient_accumulation_steps:
        settings["gradient_accumulation_steps"] = measurement.gradient_accumulation_steps
    if measurement.random_weights:
        settings |= dict.fromkeys(("train_json_path", "val_json_path"), "none is read")
    return from_flat_dict(load_toml(measurement.config) | settings | changes)


def make_setup(measurement: Measurement, folder: str, **changes) -> Setup:
    """Set up a training with the configuration that `make_config` returns."""
    return set_up(make_config(measurement, folder, **changes))


def compile_parts(step: Step, *, whole: bool) -> dict[str, Callable]:
    """Compile the parts of a step.

    Returns:
        functions without arguments that run the parts, by name, in the order of a step. With `whole`, the last one
        runs the whole step.
    """
    objective, settings, optimizer = step.objective, step.settings, step.optimizer
    state, frozen, batch, rollouts = step.state, step.frozen, step.batch, step.settings.rollouts
    region, on_policy = objective.settings.loss_region, jnp.asarray(True)
    first = jax.tree.map(lambda x: x[0], batch)

    encode_batch = jax.jit(lambda frozen, batch: encode(objective.model, frozen, batch, region))
    encoded = encode_batch(frozen, first)

    def context_of(frozen) -> LossContext:
        return LossContext(frozen, first, encoded, state.seed, state.temperature, state.strength)

    roll_out = jax.jit(
        lambda state, frozen: generate_samples(objective, replace(rollouts, rewards=()), state, context_of(frozen))[0]
    )
    samples = roll_out(state, frozen)
    clean = samples.clean
    grid = encoded.condition.grid
    decode = jax.jit(
        lambda frozen, clean: jax.lax.map(lambda x: decode_panels(objective, rollouts, frozen, x, grid), clean)
    )
    images = decode(frozen, clean)
    inputs = jax.jit(lambda frozen: reward_inputs(objective, rollouts, context_of(frozen)))(frozen)
    score_images = jax.jit(
        lambda inputs, images: jax.lax.map(lambda image: score(rollouts.rewards, replace(inputs, image=image)), images)
    )

    def collect(state, frozen):
        return collect_experience(objective, replace(settings, drift_interval=0), state, frozen, batch, on_policy)[0]

    # Builds the result of `collect` from its shapes, so that rollouts and decoding are not compiled a second time. The
    # values of the advantages do not change the time.
    old = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), jax.eval_shape(collect, state, frozen).old_terms)
    advantages = jax.random.normal(jax.random.key(1), clean.shape[:2])
    one_microbatch = Experience(encoded, objective.router_features(encoded), None, samples, advantages, old)
    experience = jax.tree.map(lambda x: jnp.repeat(x[None], len(batch["mask"]), axis=0), one_microbatch)
    experience = replace(experience, batch=batch, rewards_finite=jnp.asarray(True))
    update = jax.jit(
        lambda state, frozen, experience: learn(
            StepDefinition(objective, optimizer, settings), state, frozen, experience, on_policy=on_policy
        )
    )
    calls = {
        "encode": lambda: encode_batch(frozen, first),
        "rollout": lambda: roll_out(state, frozen),
        "decode": lambda: decode(frozen, clean),
        "rewards": lambda: score_images(inputs, images),
        "update": lambda: update(state, frozen, experience),
    }
    if whole:  # the state is not donated: every round starts from it
        whole_step = jax.jit(make_train_step(objective, optimizer, replace(settings, drift_interval=0)))
        calls["whole step"] = lambda: whole_step(state, frozen, batch)
    return calls


def print_times(measurement: Measurement, step: Step) -> None:
    """Run the parts of a step in turn, and print the median time and the share of each.

    Raises:
        SystemExit: a loss is not finite.
    """
    calls, seconds = compile_parts(step, whole=not measurement.random_weights), {}
    for _ in range(measurement.rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            result = jax.block_until_ready(call())
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            if name == "update":
                loss = result[1]["train_loss"]
    if not np.isfinite(loss).all():  # products with NaN or infinity take less time
        sys.exit(f"losses of the updates = {loss}: expected finite numbers; times with NaN or infinity are too low")
    medians = {name: float(np.median(values[1:])) for name, values in seconds.items()}
    whole = medians.pop("whole step", None)
    # All parts but the update process one microbatch of the step.
    accumulation = len(step.batch["mask"])
    medians = {name: value * (1 if name == "update" else accumulation) for name, value in medians.items()}
    total = sum(medians.values())
    print("\n| part | seconds | share |\n| --- | --- | --- |")
    for name, value in medians.items():
        print(f"| {name} | {value:.4f} | {value / total:.1%} |")
    print(f"| together | {total:.4f} | |")
    if whole is not None:
        print(f"| whole step, one program | {whole:.4f} | |")
    print(f"\ndecode and rewards: {(medians['decode'] + medians['rewards']) / total:.1%} of a step")
    if memory := jax.devices()[0].memory_stats():
        print(f"peak memory of the device: {memory['peak_bytes_in_use'] / 1e9:.1f} GB")


def print_memory(measurement: Measurement, folder: str) -> None:
    """Print the memory of the compiled step for each number of generations."""
    print("\n| generations | temporaries [MB] | needed in all [MB] | latents of the rollouts [MB] |")
    print("| --- " * 4 + "|")
    for generations in measurement.groups:
        setup = make_setup(measurement, folder, num_generations=generations)
        batch = next(setup.batches())
        step = make_train_step(setup.objective, setup.optimizer, setup.step_settings)
        program = setup.partitioner.compile(step, setup.state, setup.frozen, batch)
        microbatches, rows, height, width, _ = batch["source"].shape
        tokens = 2 * height * width // setup.loaded.model.size_multiple**2
        latents = 4 * tokens * setup.loaded.model.latent_features * microbatches * rows * generations
        temporary = program.memory_analysis().temp_size_in_bytes
        print(f"| {generations} | {temporary / 1e6:.2f} | {program_memory(program) / 1e6:.2f} | {latents / 1e6:.3f} |")


def main(measurement: Measurement) -> None:
    """Print both tables."""
    if measurement.rounds < 2:
        sys.exit(f"--rounds {measurement.rounds}: expected at least 2; the first round is not counted")
    if measurement.random_weights and measurement.groups:
        sys.exit("--random_weights with --groups: the whole step is not compiled; give --groups without values")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {jax.devices()[0].device_kind}")
    with tempfile.TemporaryDirectory() as folder:
        if measurement.random_weights:
            step = Step.from_config(make_config(measurement, folder))
        else:
            step = Step.from_setup(make_setup(measurement, folder))
        print_times(measurement, step)
        if measurement.groups:
            print_memory(measurement, folder)


if __name__ == "__main__":
    main(tyro.cli(Measurement, description=__doc__, use_underscores=True))
