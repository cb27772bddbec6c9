"""The train step as compiled programs, one per batch shape (bucket), compiled in a background thread."""

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from ra_jax.data.batch import Batch, has_results
from ra_jax.errors import ConfigError
from ra_jax.models.fill_model import Weights
from ra_jax.parallel.compilation import clear_jit_caches, device_memory, program_memory
from ra_jax.parallel.partitioner import Partitioner, Step, abstract, scalars
from ra_jax.training.fallbacks import FALLBACK
from ra_jax.training.step.settings import StepSettings
from ra_jax.training.step.state import TrainState

log = logging.getLogger(__name__)


class CompiledSteps:
    """The train step as compiled programs, to which the state is donated. `len()` is the number of programs so far.

    `prepare` compiles for a batch's shapes in a background thread and returns at once. Compilation keeps one core busy
    for a minute or more, and the first preview can be drawn at the same time. A call waits for its program.

    If a program with rewards does not fit the device, it is compiled again with a smaller decode batch. If it does not
    fit even with one image decoded at a time, a program without rewards takes its place, and the metrics of the next
    step report it (reward_fallbacks). If the records have no results either, the call raises ConfigError.

    Args:
        make_step: builds the train step from its settings.
        settings: settings of the steps.
        partitioner: compiles the step for its devices.
        conditions_per_device: number of conditions of a microbatch that one device has.
        computes_rewards: step number (from 0) -> whether the step computes rewards.
    """

    def __init__(
        self,
        make_step: Callable[[StepSettings], Step],
        settings: StepSettings,
        partitioner: Partitioner,
        conditions_per_device: int,
        computes_rewards: Callable[[int], bool] = lambda step: True,
    ):
        self._make_step, self._settings, self._partitioner = make_step, settings, partitioner
        self._conditions_per_device, self._rewards_due = conditions_per_device, computes_rewards
        self._programs: dict[Any, Future] = {}
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._unreported_fallbacks = 0  # fallbacks that no step's metrics have reported yet
        self._has_new_program = False  # whether there is a new program since the last call of `clear_jit_caches`

    def prepare(self, state: TrainState, frozen: Weights, batch: Batch, step: int = 0) -> None:
        """Start to compile the program for the shapes of this batch, unless it already exists.

        Only the shapes, dtypes and shardings of the arguments are used.
        """
        key = self._key(batch, step)
        if key not in self._programs:
            arguments = abstract((state, frozen, batch))
            if self._computes_rewards(step):
                # device_memory() is a collective call. All processes must make such calls in the same order, so it
                # is called here and not in the thread.
                compiling = self._compiler.submit(self._compile_with_rewards, arguments, device_memory())
            else:
                compiling = self._compiler.submit(self._compile_plain, arguments)
            self._programs[key], self._has_new_program = compiling, True

    def __call__(
        self, state: TrainState, frozen: Weights, batch: Batch, step: int = 0
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Run step number `step` (from 0); return the new state and the metrics."""
        self.prepare(state, frozen, batch, step)
        state, metrics = self._programs[self._key(batch, step)].result()(state, frozen, batch)
        metrics = scalars(metrics)
        if self._unreported_fallbacks:
            metrics["reward_fallbacks"] = np.float32(self._unreported_fallbacks)
            self._unreported_fallbacks = 0
        return state, metrics

    def clear_jit_caches(self) -> None:
        """Call `compilation.clear_jit_caches` if there is a new program since the last call, and all are compiled."""
        if self._has_new_program and all(compiling.done() for compiling in self._programs.values()):
            clear_jit_caches(jax.default_backend())
            self._has_new_program = False

    def __len__(self) -> int:
        return len(self._programs)

    def _computes_rewards(self, step: int) -> bool:
        return self._settings.rollouts is not None and self._rewards_due(step)

    def _key(self, batch: Batch, step: int) -> tuple:
        shapes = tuple((name, array.shape, str(array.dtype)) for name, array in sorted(batch.items()))
        return shapes, self._computes_rewards(step)

    def _compile(self, settings: StepSettings, arguments):
        return self._partitioner.compile(self._make_step(settings), *arguments)

    def _compile_plain(self, arguments):
        return self._compile(replace(self._settings, rollouts=None), arguments)

    def _compile_with_rewards(self, arguments, available: int):
        rollouts = self._settings.rollouts
        decode_batch_size = min(rollouts.decode_batch_size, self._conditions_per_device)
        while True:
            settings = replace(self._settings, rollouts=replace(rollouts, decode_batch_size=decode_batch_size))
            program, required = self._compile_measured(settings, arguments)
            if required <= available:
                return program
            if decode_batch_size == 1:
                break
            decode_batch_size //= 2
            log.warning(
                "a step with rollouts needs %s, but the device has %.1f GB: trying again with decode_batch_size %d",
                _format_bytes(required),
                available / 1e9,
                decode_batch_size,
            )
        cause = (
            f"a step with rollouts needs {_format_bytes(required)} with one image decoded at a time, but the device "
            f"has {available / 1e9:.1f} GB; lower --train_batch_size, --num_policy_timesteps or --lora_rank, use "
            "smaller --aspect_ratio_buckets, or use --gradient_checkpointing full (points needs even less memory)"
        )
        if not has_results(arguments[2]):
            raise ConfigError(f"{cause} (the records have no results, so there is no simple loss to fall back to)")
        self._unreported_fallbacks += 1
        log.warning("%s: %s", FALLBACK, cause)
        return self._compile_plain(arguments)

    def _compile_measured(self, settings: StepSettings, arguments) -> tuple[jax.stages.Compiled | None, float]:
        """Compile a program, and return it with the bytes that it needs.

        Returns (None, inf) if the compiler runs out of memory.
        """
        try:
            program = self._compile(settings, arguments)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None, math.inf
        return program, program_memory(program)


def _format_bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if math.isfinite(count) else "more memory than the compiler could find"
