"""The loop: step, log, evaluate, save, guard, preempt. Every training stage runs this one, on every rank."""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from nanotrain.config.training import SpikeAction, TrainingConfig
from nanotrain.engines.base import Engine, StepResult
from nanotrain.losses.base import LossFn
from nanotrain.optim.lr_schedule import learning_rate
from nanotrain.runtime.distributed import any_of, current_world, on_any_rank, on_first
from nanotrain.runtime.run import Run
from nanotrain.runtime.seeding import derived_seed, seed_everything
from nanotrain.runtime.signals import Preempted, PreemptionGuard
from nanotrain.runtime.tracking import build_tracker, truncate_metrics
from nanotrain.runtime.watchdog import Watchdog
from nanotrain.training.guard import SkippedStepsGuard
from nanotrain.training.meter import BAR_FORMAT, Meter, StepTimes, describe
from nanotrain.training.spike import SpikeDetector
from nanotrain.training.states import States
from nanotrain.training.teacher import Loader, TeacherLoader

log = logging.getLogger("nanotrain")

Evaluate = Callable[[], dict[str, float]]
"""Returns held-out numbers under their names in metrics.jsonl."""


@dataclass(frozen=True)
class TrainingSummary:
    """A finished training."""

    steps: int
    tokens: int
    """Read by the model, over all ranks."""
    final_loss: float
    """Of the last step that was not skipped."""
    seconds: float
    """Wall clock of the loop, all attempts together."""
    skipped_steps: int
    evaluation: dict[str, float]
    """What `evaluate` returned after the last step."""


def train(
    engine: Engine,
    loader: Loader,
    loss_fn: LossFn,
    config: TrainingConfig,
    run: Run,
    evaluate: Evaluate | None = None,
) -> TrainingSummary:
    """Train to the last step, from the newest intact state of this entry if there is one.

    Args:
        engine: holds model and optimizer.
        loader: gives the micro-batches of any step.
        loss_fn: sums over what its `denominator` counts.
        config: steps, schedule, intervals.
        run: this entry; states, metrics and tracker live in its folder.
        evaluate: called at `evaluation_interval` and after the last step.

    Raises:
        Preempted: a signal on any rank, or `run.stop_after`, asked to stop; the state is saved.
        TrainingDiverged: too many steps in a row were skipped.
        UserError: a state could not be saved, and `on_save_failure` is stop.
    """
    seed_everything(derived_seed(run.seed, run.entry))
    return _Loop(engine, config, run, evaluate).run(loader, loss_fn)


class _Loop:
    def __init__(self, engine: Engine, config: TrainingConfig, run: Run, evaluate: Evaluate | None) -> None:
        self._engine, self._config, self._run, self._evaluate = engine, config, run, evaluate
        self._states = States(engine, config, run.folder)
        self._progress = self._states.resume()
        on_first(lambda: truncate_metrics(run.folder, self._progress.step))
        self._guard = SkippedStepsGuard(
            config.max_nonfinite_steps, self._progress.skipped, self._progress.skipped_in_a_row
        )
        self._spikes = SpikeDetector(config.spike, self._progress.losses)
        self._meter = Meter(engine, config, self._progress.seconds)
        self._watchdog = Watchdog(config.watchdog_seconds)

    def run(self, loader: Loader, loss_fn: LossFn) -> TrainingSummary:
        config, run, first = self._config, self._run, current_world().is_first
        name, started_at = f"{run.name}-{run.entry}", self._progress.step
        bar = tqdm(
            total=config.steps, initial=started_at, desc=run.entry, dynamic_ncols=True, bar_format=BAR_FORMAT,
            disable=not first,
        )  # fmt: skip
        try:
            with (
                closing(build_tracker(run.tracking, run.folder, name, asdict(config), started_at)) as tracker,
                PreemptionGuard() as preemption, self._watchdog, bar,
            ):  # fmt: skip
                for step in range(started_at, config.steps):
                    result, rate, times = self._step(step, loader, loss_fn)
                    line = self._after_step(step + 1, result, rate, times)
                    if line is not None:
                        tracker.log(step + 1, line)
                        bar.set_postfix_str(describe(line), refresh=False)
                    bar.update(1)
                    self._save_or_stop(step + 1, preemption)
                self._finish(preemption)
        finally:
            self._states.close()
        return self._summary()

    def _step(self, step: int, loader: Loader, loss_fn: LossFn) -> tuple[StepResult, float, StepTimes]:
        self._watchdog.beat(f"training step {step + 1}")
        started = time.perf_counter()
        batches = loader.microbatches(step)
        loaded = time.perf_counter()
        rate = learning_rate(step, self._config)
        result = self._engine.train_step(batches, loss_fn, rate, self._spikes.max_loss)
        done = time.perf_counter()
        teaching = loader.teacher_seconds if isinstance(loader, TeacherLoader) else 0.0
        times = StepTimes(loaded - started - teaching, done - loaded + teaching, self._engine.communication_seconds)
        self._meter.count(self._config.tokens_per_step, times)
        return result, rate, times

    def _after_step(self, done: int, result: StepResult, rate: float, times: StepTimes) -> dict[str, Any] | None:
        """Take stock of a step; return its line for the log where one is due."""
        progress, config = self._progress, self._config
        spike = self._spikes.observe(result.loss)
        self._guard.observe(done, result.skipped, result.loss, result.grad_norm, spike)
        if spike is not None and not self._roll_back(done, spike):
            log.warning("step %d: %s%s", done, spike, "; its update is left out" if result.skipped else "")
        progress.step, progress.losses = done, self._spikes.history
        progress.skipped, progress.skipped_in_a_row = self._guard.total, self._guard.in_a_row
        if not result.skipped:
            progress.final_loss = result.loss
        last = done == config.steps
        evaluated = self._evaluate is not None and (
            last or (config.evaluation_interval > 0 and done % config.evaluation_interval == 0)
        )
        if not (evaluated or last or done % config.log_interval == 0):
            return None
        line = self._meter.line(done, result, rate, done * config.tokens_per_step)
        line["save_stall_seconds"], self._states.stall_seconds = self._states.stall_seconds, 0.0
        if evaluated:
            assert self._evaluate is not None
            self._watchdog.beat(f"evaluating after step {done}")
            started = time.perf_counter()
            progress.evaluation = self._evaluate()
            line |= progress.evaluation | {"evaluation_seconds": time.perf_counter() - started}
        return line

    def _roll_back(self, done: int, spike: str) -> bool:
        """Take the updates since the newest kept state back, where that is asked for; the steps stay counted as done."""
        if self._config.spike.action is not SpikeAction.roll_back:
            return False
        self._watchdog.beat(f"rolling back at step {done}")
        step = self._states.roll_back()
        if step is None:
            return False
        log.warning(
            "step %d: %s; weights and optimizer go back to step %d, training goes on with new data", done, spike, step
        )
        self._progress.rolled_back.append([step + 1, done])
        return True

    def _save_or_stop(self, done: int, preemption: PreemptionGuard) -> None:
        """Save when it is time, and stop when some rank was asked to: one small reduction a step decides for all ranks.

        Raises:
            Preempted: after saving; with the step of the newest state, should storage refuse this one.
        """
        states = self._states
        stop = preemption.received is not None or done == self._run.stop_after
        due = current_world().is_first and states.due_by_time
        stop, due, writing = any_of(stop, due, states.writing)
        if not writing:
            states.settle()  # at once: the thread is done on every rank
        stop = stop and done < self._config.steps  # after the last step `_finish` asks
        if stop or states.due_by_step(done) or (due and not writing):
            self._watchdog.beat(f"saving after step {done}")
            self._progress.seconds = self._meter.seconds
            states.save(self._progress)
        if stop:
            saved = states.settle()
            raise Preempted(preemption.received or "a signal to another rank", done if saved else states.newest_step)

    def _finish(self, preemption: PreemptionGuard) -> None:
        """Wait for the last state. A signal since the last step stops the run here: what comes after has not heard of it.

        Raises:
            Preempted: with the step of the newest state, should storage have refused the last one.
        """
        saved = self._states.settle()
        if on_any_rank(preemption.received is not None):
            step = self._progress.step if saved else self._states.newest_step
            raise Preempted(preemption.received or "a signal to another rank", step)

    def _summary(self) -> TrainingSummary:
        progress = self._progress
        return TrainingSummary(
            steps=progress.step,
            tokens=progress.step * self._config.tokens_per_step,
            final_loss=progress.final_loss,
            seconds=self._meter.seconds,
            skipped_steps=progress.skipped,
            evaluation=progress.evaluation,
        )
