"""Training loop: runs the compiled step on batches and writes metrics, checkpoints, previews and curves."""

import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

import jax
from tqdm import tqdm

from ra_jax.checkpoints import BEST_DIR, Checkpoints, checkpoint_bytes, step_of
from ra_jax.config.parse import to_flat_dict
from ra_jax.config.settings import TrainConfig
from ra_jax.data.batch import Batch
from ra_jax.outputs import explain_full_disk
from ra_jax.parallel.compilation import enable_compilation_cache
from ra_jax.parallel.processes import is_main_process, should_stop
from ra_jax.reporting.curves import plot_curves
from ra_jax.reporting.page import write_report
from ra_jax.reporting.trackers import METRICS_FILE, open_trackers, read_rows, summarize
from ra_jax.training.fallbacks import RewardFallbacks
from ra_jax.training.flops import ModelSizes, flops_from_config
from ra_jax.training.held_out import Judgment
from ra_jax.training.setup import Setup, set_up
from ra_jax.training.step.state import TrainState

log = logging.getLogger(__name__)

PROGRESS_METRICS = ("train_loss", "mean_reward", "mean_ratio", "clip_fraction", "velocity_norm_ratio", "step_time")


def train(config: TrainConfig) -> Path:
    """Run the training that `config` describes, and return the output folder.

    The output folder contains checkpoints, metrics.jsonl, previews, curves.png and report.html. SIGTERM ends the run
    after the step in progress, with a checkpoint and exit status 143. With `--max_drift`, a run that drifts too far
    ends early, and the folder `best/` has the run's best checkpoint.

    Raises:
        UserError: `set_up` raises it.
        OutputError: the disk is full.
        FloatingPointError: the loss or the gradient is not finite, or rewards failed in ten steps in a row. No
            checkpoint is written after that.
    """
    enable_compilation_cache(config.run.jax_compilation_cache_dir)
    ending = "interrupted"
    with explain_full_disk(Path(config.run.output_dir)), ExitStack() as stack:
        setup = set_up(config)
        config = setup.config
        checkpoints, recorder = RunCheckpoints(config, setup), Recorder(config, setup)
        # Called in reverse order, each of them also if another one fails.
        stack.callback(lambda: report(config, setup, ending))
        stack.callback(recorder.close)
        stack.callback(checkpoints.close)
        try:
            ending = run_steps(config, setup, recorder, checkpoints)
            checkpoints.latest()  # waits for the last save, which may fail
        except (Exception, SystemExit) as error:
            ending = "stopped by SIGTERM" if isinstance(error, SystemExit) else f"stopped by an error: {error}"
            raise
    return setup.output


def report(config: TrainConfig, setup: Setup, ending: str) -> None:
    """Draw the curves, write the report, and log how the run ended and where its best checkpoint is."""
    if not is_main_process():
        return
    curves = plot_curves(setup.output, config.experts.names)
    page = write_report(setup.output, to_flat_dict(config), config.experts.names, ending)
    log.info("%s; curves: %s, report: %s", ending, curves, page)
    if (best := setup.held_out.describe()) is not None:
        log.info("%s", best)


def run_steps(config: TrainConfig, setup: Setup, recorder: "Recorder", checkpoints: "RunCheckpoints") -> str:
    """Run all steps from `first_step` on, and write the metrics, checkpoints and previews that are due.

    Returns a description of how the run ended, for the report.
    """
    state, train_step, total_steps = setup.state, setup.compiled_steps(), setup.total_steps
    checkpoint_interval = config.run.checkpointing_steps or total_steps
    if setup.first_step >= total_steps:
        return first_look(config, setup, recorder, checkpoints) or "completed"
    batches = setup.batches()
    first_batch = next(batches)
    for step in setup.first_step_per_program():
        train_step.prepare(state, setup.frozen, first_batch, step)
    if (ending := first_look(config, setup, recorder, checkpoints)) is not None:
        return ending
    batches = recorder.time_waits(chain([first_batch], batches))
    with catch_sigterm() as stop_flag:
        for steps_done, batch in zip(range(setup.first_step + 1, total_steps + 1), batches, strict=False):
            state, metrics = train_step(state, setup.frozen, batch, steps_done - 1)
            recorder.add(steps_done, metrics, batch)
            train_step.clear_jit_caches()
            # The flag is read only once per step: a SIGTERM that arrives later ends the run after the next step.
            stopping = should_stop(stop_flag.is_set, steps_done)
            is_last = steps_done == total_steps
            judgment = Judgment() if stopping else judge(config, setup, recorder, state, steps_done)
            is_last |= stopping or judgment.ending is not None
            checkpoint_due = is_last or steps_done % checkpoint_interval == 0
            if checkpoint_due or judgment.metrics or recorder.is_row_due(steps_done):
                recorder.flush(steps_done, judgment.metrics)
            checkpoints.save(steps_done, state, regular=checkpoint_due and not judgment.drifted, best=judgment.is_best)
            if stopping:
                raise SystemExit(128 + signal.SIGTERM)
            if judgment.ending is not None:
                return describe_ending(steps_done, judgment, checkpoints)
    return "completed"


def describe_ending(steps_done: int, judgment: Judgment, checkpoints: "RunCheckpoints") -> str:
    """Describe why a run ends early, and which checkpoint is left of a run that has drifted too far."""
    ending = f"stopped at step {steps_done} by {judgment.ending}"
    if not judgment.drifted:
        return ending
    latest = checkpoints.latest()
    if latest is None:
        return f"{ending}; no checkpoint was saved before: lower --checkpointing_steps, or raise --max_drift"
    if step_of(latest) == steps_done:
        return f"{ending}; the latest checkpoint {latest} has these weights: use an earlier one"
    return f"{ending}; these weights are not saved, the latest checkpoint is {latest}"


def first_look(config: TrainConfig, setup: Setup, recorder: "Recorder", checkpoints: "RunCheckpoints") -> str | None:
    """Make the held-out measurements before the first step of this start; return how they end the run, or None.

    A resumed run makes them only if it has not yet taken the look that is due. SIGTERM ends a run without the look of
    its last step, because the look could take longer than there is time.
    """
    step, held_out = setup.first_step, setup.held_out
    lacks_look = held_out.chooses_best and is_look_due(config, setup, step) and held_out.record.latest_step != step
    if step > 0 and not lacks_look:
        return None
    judgment = judge(config, setup, recorder, setup.state, step)
    recorder.write_extra(step, judgment.metrics)
    checkpoints.save(step, setup.state, regular=False, best=judgment.is_best)
    return None if judgment.ending is None else describe_ending(step, judgment, checkpoints)


def is_look_due(config: TrainConfig, setup: Setup, steps_done: int) -> bool:
    """Return whether a look is due: before the first step, after every `--validation_steps`, after the last step."""
    interval = config.logging.validation_steps
    return interval > 0 and (steps_done >= setup.total_steps or steps_done % interval == 0)


def judge(config: TrainConfig, setup: Setup, recorder: "Recorder", state: TrainState, steps_done: int) -> Judgment:
    """Make the held-out measurements that are due after `steps_done` steps (`HeldOut.judge`).

    A measurement of drift is due after every `--drift_steps` and after the last step. A look judges the averaged
    weights if the state has them (`--ema_decay`), else the current weights.
    """
    is_last, look_due = steps_done == setup.total_steps, is_look_due(config, setup, steps_done)
    drift_due = config.run.max_drift is not None and (is_last or steps_done % config.run.drift_steps == 0)
    if not (look_due or drift_due):
        return Judgment()
    removing = state.trainable if state.ema is None else state.ema
    with recorder.paused(), setup.partitioner.scope():
        weights = setup.partitioner.addressable((state.trainable, removing, setup.frozen))
        return setup.held_out.judge(steps_done, *weights, look_due=look_due, drift_due=drift_due)


class RunCheckpoints:
    """Writes the run's checkpoints, and its best checkpoint into `best/`."""

    def __init__(self, config: TrainConfig, setup: Setup):
        settings = to_flat_dict(config) | {"init_experts_from": setup.initial_experts}
        self._metadata = {"config": settings, "base": setup.loaded.fingerprint}
        self._limit = config.run.checkpoints_total_limit or None  # 0: all
        self._regular = Checkpoints(setup.output, limit=self._limit)
        self._best = Checkpoints(setup.output, folder=BEST_DIR, limit=1) if setup.held_out.chooses_best else None
        self._unshard = setup.partitioner.unshard
        if is_main_process():
            self._describe_room(config, setup)

    def _describe_room(self, config: TrainConfig, setup: Setup) -> None:
        """Log the size of a checkpoint, and warn if those that the run keeps do not fit the disk."""
        size = checkpoint_bytes(self._unshard(setup.state))
        free = shutil.disk_usage(setup.output).free
        limit, interval = self._limit, config.run.checkpointing_steps or setup.total_steps
        remaining = max(0, -(-(setup.total_steps - setup.first_step) // interval))
        # While a checkpoint is written, the one that it replaces is still there.
        count = (remaining if limit is None else min(remaining, limit + 1)) + 2 * (self._best is not None)
        message = "a checkpoint takes %.3g GB, and the run needs room for up to %d; %s has %.3g GB free"
        if count * size <= free:
            log.info(message, size / 1e9, count, setup.output, free / 1e9)
            return
        log.warning(
            f"{message}: raise --checkpointing_steps, or lower --checkpoints_total_limit or --lora_rank",
            *(size / 1e9, count, setup.output, free / 1e9),
        )

    def save(self, steps_done: int, state: TrainState, *, regular: bool, best: bool) -> None:
        """Start to save the state after `steps_done` steps: as a regular checkpoint, as the best one, or both."""
        for checkpoints, due in ((self._regular, regular), (self._best, best)):
            if due:
                checkpoints.save(steps_done, self._unshard(state), position=steps_done, **self._metadata)

    def latest(self) -> Path | None:
        """Wait for saves in progress, and return the latest checkpoint in either folder; None if there is none."""
        return max(filter(None, [checkpoints.latest() for checkpoints in self._all()]), key=step_of, default=None)

    def close(self) -> None:
        """Wait for saves in progress, then release the folders."""
        with ExitStack() as stack:  # releases the others, too, if one fails
            for checkpoints in self._all():
                stack.callback(checkpoints.close)

    def _all(self) -> list[Checkpoints]:
        return [checkpoints for checkpoints in (self._regular, self._best) if checkpoints is not None]


class Recorder:
    """Collects the metrics of steps and writes them as rows to every tracker.

    The metrics stay on the device until a row is due, so that the host does not wait for the device after every step.
    """

    def __init__(self, config: TrainConfig, setup: Setup):
        self._config, self._setup = config, setup
        is_main = is_main_process()
        self._trackers = open_trackers(setup.output, config.logging.report_to, setup.first_step) if is_main else []
        bar_options = {} if is_main else {"disable": True}
        self._bar = tqdm(
            total=setup.total_steps, initial=setup.first_step, unit="step", dynamic_ncols=True, **bar_options
        )
        earlier_rows = read_rows(setup.output / METRICS_FILE) if is_main else []  # only process 0 writes this file
        counts = [row["reward_fallbacks"] for row in earlier_rows if "reward_fallbacks" in row]
        self._fallbacks = RewardFallbacks(counts[-1] if counts else 0.0)
        self._pending_metrics: list[dict[str, jax.Array]] = []
        self._images = self._tflops = self._data_wait = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def paused(self):
        """Context manager that excludes the time of its block from the measured step time.

        It first waits for the steps in progress. The time of these steps still counts.
        """
        jax.block_until_ready(self._pending_metrics)
        pause_start = time.perf_counter()
        yield
        self._start += time.perf_counter() - pause_start

    def time_waits(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches and measure the time spent waiting for them."""
        while True:
            wait_start = time.perf_counter()
            batch = next(batches, None)
            self._data_wait += time.perf_counter() - wait_start
            if batch is None:
                return
            yield batch

    def add(self, steps_done: int, metrics: dict[str, jax.Array], batch: Batch) -> None:
        """Store a step's metrics without copying them from the device, and count the step's images and FLOPs."""
        self._pending_metrics.append(metrics)
        run, loaded = self._config.run, self._setup.loaded
        self._images += run.train_batch_size * run.gradient_accumulation_steps
        sizes = ModelSizes(
            loaded.flux_config, loaded.trainable["flux"], loaded.model.size_multiple, loaded.image_tokens
        )
        self._tflops += 1e-12 * flops_from_config(self._config, sizes, batch, steps_done - 1)

    def is_row_due(self, steps_done: int) -> bool:
        """Return whether to write a row: after every `--log_freq` steps, and after the first step of this start.

        The row of the first step shows early that the run works.
        """
        return steps_done == self._setup.first_step + 1 or steps_done % self._config.logging.log_freq == 0

    def flush(self, steps_done: int, extra_metrics: Mapping[str, float] | None = None) -> dict[str, float]:
        """Write and return one row for all steps since the last row. The row also gets `extra_metrics`.

        Raises FloatingPointError if the loss or the gradient is not finite, or rewards failed in ten steps in a row.
        """
        steps = jax.device_get(self._pending_metrics)
        row = summarize(steps) | dict(extra_metrics or {})
        if self._setup.step_settings.rollouts is not None:
            row["reward_fallbacks"] = self._fallbacks.count(steps, steps_done)
        seconds = time.perf_counter() - self._start
        row |= {
            "lr": float(self._setup.learning_rate(steps_done - 1)),
            "step_time": seconds / len(steps),
            "data_wait": self._data_wait / len(steps),
            "images_per_second": self._images / seconds,
            "tflops_per_second_per_device": self._tflops / seconds / jax.device_count(),
        }
        for tracker in self._trackers:
            tracker.write(steps_done, row)
        self._bar.set_postfix({name: f"{row[name]:.4g}" for name in PROGRESS_METRICS if name in row}, refresh=False)
        self._bar.update(steps_done - self._bar.n)
        self._pending_metrics, self._images, self._tflops, self._data_wait = [], 0.0, 0.0, 0.0
        self._start = time.perf_counter()
        # The loss is computed with the weights before the update. The gradient shows whether the new ones are finite.
        for name in (name for name in ("train_loss", "grad_norm") if not math.isfinite(row[name])):
            raise FloatingPointError(
                f"{name} is {row[name]} at step {steps_done}: lower --learning_rate or --policy_loss_weight, "
                "check --max_grad_norm, or use --mixed_precision no; the last checkpoint is unchanged"
            )
        return row

    def write_extra(self, steps_done: int, metrics: Mapping[str, float]) -> None:
        """Write held-out measurements before the first step of this start as a row of their own, if there are any."""
        if metrics:
            for tracker in self._trackers:
                tracker.write(steps_done, dict(metrics))

    def close(self) -> None:
        """Close the progress bar and the trackers."""
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()


class _StopFlag:
    is_set = False


@contextmanager
def catch_sigterm():
    """Context manager in which SIGTERM sets `is_set` of the yielded object, so that the step in progress can finish.

    With several processes, JAX handles SIGTERM for all of them (`processes.should_stop`), and `is_set` stays False.
    """
    stop_flag = _StopFlag()
    if jax.process_count() > 1:
        yield stop_flag
        return

    def set_flag(*_):
        stop_flag.is_set = True

    previous_handler = signal.signal(signal.SIGTERM, set_flag)
    try:
        yield stop_flag
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
