"""What a step of automatic GRPO costs, part by part, and how its memory grows with the group.

    python scripts/measure_step.py [--config configs/tiny_auto.toml] [--rounds 10] [--groups 2 4 8 16]

Compiles encoding, rollout, decoding, rewards and update apart, runs them in turn, and prints each one's median time and
its share; then the compiled whole step's temporary memory for several --num_generations, beside what the latents of the
rollouts themselves take. Needs what the configuration names (`python -m ra_jax.demo` makes it for the default).
"""

import os
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ra_jax.config import TrainConfig, from_flat_dict, load_toml
from ra_jax.training.encoded import encode
from ra_jax.training.experience import collect
from ra_jax.training.generation import decode_panels, reward_inputs, roll_out_members, scores_of
from ra_jax.training.programs import memory_needed
from ra_jax.training.setup import Setup, set_up
from ra_jax.training.step import learn, make_train_step


@dataclass(frozen=True)
class Measurement:
    """config: of automatic mode; rounds: runs of each part, the first two not counted; groups: --num_generations for
    the memory table."""

    config: Path = Path("configs/tiny_auto.toml")
    rounds: int = 12
    groups: tuple[int, ...] = (2, 4, 8, 16)


def prepared(measurement: Measurement, folder: str, **changes) -> tuple[TrainConfig, Setup]:
    settings = {"output_dir": folder, "overwrite_output_dir": True, "report_to": ["none"], "validation_steps": 0}
    config = from_flat_dict(load_toml(measurement.config) | settings | changes)
    return config, set_up(config)


def parts(setup: Setup) -> dict:
    """Compiled functions of no arguments, in the order of a step."""
    objective, settings, state = setup.objective, setup.step_settings, setup.state
    rollouts, frozen = settings.rollouts, setup.frozen
    batch = next(setup.batches())
    region, fresh = objective.settings.loss_region, jnp.asarray(True)
    first = jax.tree.map(lambda x: x[0], batch)

    encode_ = jax.jit(lambda frozen, batch: encode(objective.model, frozen, batch, region))
    encoded = encode_(frozen, first)
    roll_out = jax.jit(
        lambda state, frozen: roll_out_members(objective, replace(rollouts, rewards=()), state, frozen, first, encoded)[
            0
        ]
    )
    clean = roll_out(state, frozen).clean
    grid = encoded.condition.grid
    decode = jax.jit(
        lambda frozen, clean: jax.lax.map(lambda x: decode_panels(objective, rollouts, frozen, x, grid), clean)
    )
    images = decode(frozen, clean)
    inputs = jax.jit(lambda frozen: reward_inputs(objective, rollouts, frozen, first, encoded))(frozen)
    score = jax.jit(
        lambda inputs, images: jax.lax.map(
            lambda image: scores_of(rollouts.rewards, replace(inputs, image=image)), images
        )
    )
    experience, _ = jax.jit(
        lambda state, frozen: collect(objective, rollouts, state, frozen, batch, renewed=fresh, drift_interval=0)
    )(state, frozen)
    update = jax.jit(
        lambda state, frozen, experience: learn(
            objective, setup.optimizer, settings, state, frozen, batch, experience, fresh=fresh
        )
    )
    # Not donated: every round starts from the same state.
    whole = jax.jit(make_train_step(objective, setup.optimizer, replace(settings, drift_interval=0)))
    return {
        "encode": lambda: encode_(frozen, first),
        "rollout": lambda: roll_out(state, frozen),
        "decode": lambda: decode(frozen, clean),
        "rewards": lambda: score(inputs, images),
        "update": lambda: update(state, frozen, experience),
        "whole step": lambda: whole(state, frozen, batch),
    }


def main(measurement: Measurement) -> None:
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {jax.devices()[0].device_kind}")
    with tempfile.TemporaryDirectory() as folder:
        config, setup = prepared(measurement, folder)
        accumulation, seconds, calls = config.run.gradient_accumulation_steps, {}, parts(setup)
        for _ in range(measurement.rounds):
            for name, call in calls.items():
                since = time.perf_counter()
                jax.block_until_ready(call())
                seconds.setdefault(name, []).append(time.perf_counter() - since)
        medians = {name: float(np.median(values[2:])) for name, values in seconds.items()}
        whole = medians.pop("whole step")
        # The others but the update work on one microbatch of the step's.
        medians = {name: value * (1 if name == "update" else accumulation) for name, value in medians.items()}
        total = sum(medians.values())
        print("\n| part | seconds | share |\n| --- | --- | --- |")
        for name, value in medians.items():
            print(f"| {name} | {value:.4f} | {value / total:.1%} |")
        judging = (medians["decode"] + medians["rewards"]) / total
        print(f"| together | {total:.4f} | |\n| whole step, one program | {whole:.4f} | |")
        print(f"\ndecode and rewards: {judging:.1%} of a step")

        print(
            "\n| generations | temporaries [MB] | needed in all [MB] | latents of the rollouts [MB] |\n"
            + "| --- " * 4
            + "|"
        )
        for generations in measurement.groups:
            config, setup = prepared(measurement, folder, num_generations=generations)
            batch = next(setup.batches())
            step = make_train_step(setup.objective, setup.optimizer, setup.step_settings)
            program = setup.launch.compile(step, setup.state, setup.frozen, batch)
            microbatches, rows, height, width, _ = batch["source"].shape
            tokens = 2 * height * width // setup.loaded.model.multiple**2
            latents = 4 * tokens * setup.loaded.model.latent_features * microbatches * rows * generations
            temporary = program.memory_analysis().temp_size_in_bytes
            print(
                f"| {generations} | {temporary / 1e6:.2f} | {memory_needed(program) / 1e6:.2f} | {latents / 1e6:.3f} |"
            )


if __name__ == "__main__":
    main(tyro.cli(Measurement, use_underscores=True))
