"""Training loop: runs the compiled step on batches and writes metrics, checkpoints, previews and curves."""

import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import jax
from tqdm import tqdm

from ra_jax.checkpoints import BEST_DIR, Checkpoints
from ra_jax.config.parse import to_flat_dict
from ra_jax.config.settings import TrainConfig
from ra_jax.data.batch import Batch
from ra_jax.parallel.compilation import enable_compilation_cache
from ra_jax.parallel.processes import is_main_process, should_stop
from ra_jax.reporting.curves import plot_curves
from ra_jax.reporting.page import write_report
from ra_jax.reporting.trackers import METRICS_FILE, open_trackers, read_rows, summarize
from ra_jax.training.fallbacks import RewardFallbacks
from ra_jax.training.flops import ModelSizes, flops_of_step
from ra_jax.training.setup import Setup, set_up
from ra_jax.training.step.state import TrainState

log = logging.getLogger(__name__)

PROGRESS_METRICS = ("train_loss", "mean_reward", "mean_ratio", "clip_fraction", "velocity_norm_ratio", "step_time")


def train(config: TrainConfig) -> Path:
    """Train as `config` says and return the output folder.

    The output folder contains checkpoints, metrics.jsonl, previews, curves.png and report.html. SIGTERM ends the run
    after the step in progress, with a checkpoint and exit status 143. With `--max_drift`, a run that drifts too far
    ends early; its best checkpoint is in `best/`.

    Raises:
        UserError: any error of `set_up`.
        FloatingPointError: the loss or the gradient is not finite, or rewards failed in ten steps in a row. No
            checkpoint is written after that.
    """
    enable_compilation_cache(config.run.jax_compilation_cache_dir)
    setup = set_up(config)
    checkpoints, recorder = RunCheckpoints(config, setup), Recorder(config, setup)
    ending = "interrupted"
    try:
        ending = run_steps(config, setup, recorder, checkpoints)
    except (Exception, SystemExit) as error:
        ending = "stopped by SIGTERM" if isinstance(error, SystemExit) else f"stopped by an error: {error}"
        raise
    finally:
        checkpoints.close()
        recorder.close()
        if is_main_process():
            curves = plot_curves(setup.output, config.experts.names)
            report = write_report(setup.output, to_flat_dict(config), config.experts.names, ending)
            log.info("%s; curves: %s, report: %s", ending, curves, report)
    return setup.output


def run_steps(config: TrainConfig, setup: Setup, recorder: "Recorder", checkpoints: "RunCheckpoints") -> str:
    """Run all steps from `first_step` on, and write the metrics, checkpoints and previews that are due.

    Returns a description of how the run ended, for the report.
    """
    state, train_step, total = setup.state, setup.compiled_steps(), setup.total_steps
    unshard, interval = setup.partitioner.unshard, config.run.checkpointing_steps or total
    if setup.first_step >= total:
        return "completed"
    batches = setup.batches()
    first_batch = next(batches)
    for number in setup.first_step_per_program():
        train_step.prepare(state, setup.frozen, first_batch, number)
    if setup.first_step == 0:
        with recorder.paused():
            draw_preview(setup, state, 0)
    batches = recorder.time_waits(chain([first_batch], batches))
    with catch_sigterm() as stop:
        for done, batch in zip(range(setup.first_step + 1, total + 1), batches, strict=False):
            state, metrics = train_step(state, setup.frozen, batch, done - 1)
            recorder.add(done, metrics, batch)
            train_step.clear_jit_caches()
            stopping = should_stop(stop.is_set, done)  # read once: a later SIGTERM ends the run after the next step
            last = done == total or stopping
            if setup.guard is not None and (last or due(done, config.run.drift_steps)):
                with recorder.paused(), setup.partitioner.scope():
                    drift = setup.guard.measure(*setup.partitioner.addressable((state.trainable, setup.frozen)))
                row = recorder.flush(done, drift.metrics())
                if (excess := drift.excess(setup.guard.limit)) and not stopping:
                    limit, best = setup.guard.limit, checkpoints.describe_best()
                    return f"stopped at step {done} by max_drift = {limit:g}: {excess}; {best}"
                if setup.guard.is_best(drift, row, config.mode):
                    checkpoints.save_best(done, unshard(state))
            elif last or done % interval == 0 or recorder.due(done):
                recorder.flush(done)
            if last or done % interval == 0:
                checkpoints.save(done, unshard(state))
            if stopping:
                raise SystemExit(128 + signal.SIGTERM)
            if last or due(done, config.logging.validation_steps):
                with recorder.paused():
                    draw_preview(setup, state, done)
    return "completed"


class RunCheckpoints:
    """Writes the run's checkpoints and, with `--max_drift`, its best checkpoint into `best/`."""

    def __init__(self, config: TrainConfig, setup: Setup):
        self._metadata = {"config": to_flat_dict(config), "base": setup.loaded.fingerprint}
        self._regular = Checkpoints(setup.output, limit=config.run.checkpoints_total_limit)
        self._best = None if setup.guard is None else Checkpoints(setup.output, folder=BEST_DIR, limit=1)
        if self._best is not None:
            self._best.delete_after(setup.first_step)

    def save(self, done: int, state: TrainState) -> None:
        """Start saving a regular checkpoint of the state after `done` steps."""
        self._regular.save(done, state, position=done, **self._metadata)

    def save_best(self, done: int, state: TrainState) -> None:
        """Start saving the state after `done` steps as the best so far."""
        self._best.save(done, state, position=done, **self._metadata)

    def describe_best(self) -> str:
        """Describe where the best checkpoint is, for the message of a run that drifted too far."""
        best = self._best.latest()
        return "no checkpoint is within the limit" if best is None else f"the best checkpoint is {best}"

    def close(self) -> None:
        """Wait for saves in progress, then release the folders."""
        for checkpoints in (self._regular, self._best):
            if checkpoints is not None:
                checkpoints.close()


def due(done: int, interval: int) -> bool:
    """Return whether step number `done` ends an interval; False if the interval is 0."""
    return interval > 0 and done % interval == 0


def draw_preview(setup: Setup, state: TrainState, step: int) -> None:
    """Draw a preview with the averaged weights, or with the current weights without `--ema_decay`."""
    if setup.previews is not None:
        weights = state.trainable if state.ema is None else state.ema
        with setup.partitioner.scope():
            log.info("preview: %s", setup.previews.draw(step, *setup.partitioner.addressable((weights, setup.frozen))))


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
        self._fallbacks = RewardFallbacks(earlier_rows[-1].get("reward_fallbacks", 0.0) if earlier_rows else 0.0)
        self._pending_metrics: list[dict[str, jax.Array]] = []
        self._images = self._tflops = self._data_wait = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def paused(self):
        """Context manager that excludes the time of its block from the measured step time.

        It first waits for the steps in progress, whose time still counts.
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

    def add(self, done: int, metrics: dict[str, jax.Array], batch: Batch) -> None:
        """Store a step's metrics, which stay on the device, and count its images and FLOPs."""
        self._pending_metrics.append(metrics)
        run, loaded = self._config.run, self._setup.loaded
        self._images += run.train_batch_size * run.gradient_accumulation_steps
        sizes = ModelSizes(loaded.flux_config, loaded.trainable["flux"], loaded.model.multiple, loaded.image_tokens)
        self._tflops += 1e-12 * flops_of_step(self._config, sizes, batch, done - 1)

    def due(self, done: int) -> bool:
        """Return whether a row is due: every `--log_freq` steps, and after the first one to show that the run works."""
        return done == self._setup.first_step + 1 or done % self._config.logging.log_freq == 0

    def flush(self, done: int, more: Mapping[str, float] | None = None) -> dict[str, float]:
        """Write and return one row for all steps since the last row, with the additional metrics `more`.

        Raises FloatingPointError if the loss or the gradient is not finite, or rewards failed in ten steps in a row.
        """
        steps = jax.device_get(self._pending_metrics)
        row = summarize(steps) | dict(more or {})
        if self._setup.step_settings.rollouts is not None:
            row["reward_fallbacks"] = self._fallbacks.count(steps, done)
        seconds = time.perf_counter() - self._start
        row |= {
            "lr": float(self._setup.learning_rate(done - 1)),
            "step_time": seconds / len(steps),
            "data_wait": self._data_wait / len(steps),
            "images_per_second": self._images / seconds,
            "tflops_per_second_per_device": self._tflops / seconds / jax.device_count(),
        }
        for tracker in self._trackers:
            tracker.write(done, row)
        self._bar.set_postfix({name: f"{row[name]:.4g}" for name in PROGRESS_METRICS if name in row}, refresh=False)
        self._bar.update(done - self._bar.n)
        self._pending_metrics, self._images, self._tflops, self._data_wait = [], 0.0, 0.0, 0.0
        self._start = time.perf_counter()
        # The loss comes from the weights before the update. The gradient shows whether the new weights are finite.
        for name in (name for name in ("train_loss", "grad_norm") if not math.isfinite(row[name])):
            raise FloatingPointError(
                f"{name} is {row[name]} at step {done}: lower --learning_rate or --policy_loss_weight, "
                "check --max_grad_norm, or use --mixed_precision no; the last checkpoint is unchanged"
            )
        return row

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

    With several processes it does nothing: JAX then handles SIGTERM for all of them (`processes.should_stop`).
    """
    stop = _StopFlag()
    if jax.process_count() > 1:
        yield stop
        return

    def set_flag(*_):
        stop.is_set = True

    previous_handler = signal.signal(signal.SIGTERM, set_flag)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
