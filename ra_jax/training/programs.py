"""The train step as compiled programs, one for each shape of batch (a bucket), compiled beside other work."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from ra_jax.inference.sampling import Batch
from ra_jax.models.fill_model import Weights
from ra_jax.training.state import TrainState


class StepPrograms:
    """`train_step` jitted with the state donated: (state, frozen, batch) -> (state, metrics); len(): programs so far.

    `prepare` begins to compile for a batch's shapes in a thread and returns at once, so that the first preview can be
    drawn meanwhile: compilation keeps one core busy for a minute and more. A call waits for its program.
    """

    def __init__(self, train_step: Callable[[TrainState, Weights, Batch], tuple[TrainState, dict[str, jax.Array]]]):
        self._step = jax.jit(train_step, donate_argnums=0)
        self._programs: dict[Any, Future] = {}
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compile")

    def prepare(self, state: TrainState, frozen: Weights, batch: Batch) -> None:
        """Have the program for batches of these shapes, now or soon. Only shapes and types are read."""
        shapes = _shapes(batch)
        if shapes not in self._programs:
            arguments = jax.tree.map(jax.typeof, (state, frozen, batch))
            self._programs[shapes] = self._compiler.submit(lambda: self._step.lower(*arguments).compile())

    def __call__(self, state: TrainState, frozen: Weights, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        self.prepare(state, frozen, batch)
        return self._programs[_shapes(batch)].result()(state, frozen, batch)

    def __len__(self) -> int:
        return len(self._programs)


def _shapes(batch: Batch) -> tuple:
    return tuple((name, array.shape, str(array.dtype)) for name, array in sorted(batch.items()))
