"""The train step as compiled programs, one for each shape of batch (a bucket), compiled beside other work."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from ra_jax.inference.sampling import Batch
from ra_jax.models.fill_model import Weights
from ra_jax.training.fallbacks import FALLBACK
from ra_jax.training.state import TrainState
from ra_jax.training.step import StepSettings

log = logging.getLogger(__name__)

TrainStep = Callable[[TrainState, Weights, Batch], tuple[TrainState, dict[str, jax.Array]]]


class StepPrograms:
    """`train_step` jitted with the state donated; len(): programs so far.

    make_step: settings -> train step; reward_interval: rewards are computed in every so manieth step, from step 0 on.
    `prepare` begins to compile for a batch's shapes in a thread and returns at once, so that the first preview can be
    drawn meanwhile: compilation keeps one core busy for a minute and more. A call waits for its program.

    A program that computes rewards and does not fit the device is compiled again with smaller decode microbatches; if
    the smallest is too large, training goes on without rewards, and the next step's metrics say so (reward_fallbacks).
    """

    def __init__(
        self, make_step: Callable[[StepSettings], TrainStep], settings: StepSettings, reward_interval: int = 1
    ):
        self._make_step, self._settings, self._interval = make_step, settings, reward_interval
        self._programs: dict[Any, Future] = {}
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._fallbacks = 0  # not yet told

    def prepare(self, state: TrainState, frozen: Weights, batch: Batch, step: int = 0) -> None:
        """Have the program for batches of these shapes, now or soon. Only shapes and types are read."""
        key = self._key(batch, step)
        if key not in self._programs:
            arguments = jax.tree.map(jax.typeof, (state, frozen, batch))
            compile_ = self._compile_with_rewards if self._rewarded(step) else self._compile_plain
            self._programs[key] = self._compiler.submit(compile_, arguments)

    def __call__(
        self, state: TrainState, frozen: Weights, batch: Batch, step: int = 0
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Take step number `step` (from 0)."""
        self.prepare(state, frozen, batch, step)
        state, metrics = self._programs[self._key(batch, step)].result()(state, frozen, batch)
        if self._fallbacks:
            metrics["reward_fallbacks"] = np.float32(self._fallbacks)
            self._fallbacks = 0
        return state, metrics

    def __len__(self) -> int:
        return len(self._programs)

    def _rewarded(self, step: int) -> bool:
        return self._settings.rollouts is not None and step % self._interval == 0

    def _key(self, batch: Batch, step: int) -> tuple:
        shapes = tuple((name, array.shape, str(array.dtype)) for name, array in sorted(batch.items()))
        return shapes, self._rewarded(step)

    def _compile(self, settings: StepSettings, arguments):
        return jax.jit(self._make_step(settings), donate_argnums=0).lower(*arguments).compile()

    def _compile_plain(self, arguments):
        return self._compile(replace(self._settings, rollouts=None), arguments)

    def _compile_with_rewards(self, arguments):
        rollouts, available = self._settings.rollouts, device_memory()
        decoded = rollouts.decode_batch_size
        while True:
            program = self._compile(
                replace(self._settings, rollouts=replace(rollouts, decode_batch_size=decoded)), arguments
            )
            needed = memory_needed(program)
            if needed <= available:
                return program
            if decoded == 1:
                break
            decoded //= 2
        self._fallbacks += 1
        log.warning(
            "%s: a step with rollouts needs %.1f GB with one image decoded at a time, the device has %.1f GB; lower "
            "--train_batch_size, --num_policy_timesteps or --lora_rank, use smaller --aspect_ratio_buckets or "
            "--gradient_checkpointing full",
            FALLBACK,
            needed / 1e9,
            available / 1e9,
        )
        return self._compile_plain(arguments)


def memory_needed(program: jax.stages.Compiled) -> int:
    """Bytes that a compiled program needs at its peak: arguments, results that are not arguments, temporaries."""
    memory = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def device_memory() -> int:
    """Bytes that a program may use: the device's own limit, or the host's memory where it has none (CPU)."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if limit is None else limit
