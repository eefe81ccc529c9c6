"""The loop: step, log, evaluate, save, guard, preempt. Every training stage runs this one."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from nanotrain.checkpoint.resume import latest_resume_state, save_resume_state
from nanotrain.config.training import TrainingConfig
from nanotrain.engines.base import Engine, StepResult
from nanotrain.losses.base import LossFn
from nanotrain.optim.lr_schedule import learning_rate
from nanotrain.runtime.run import Run
from nanotrain.runtime.seeding import derived_seed, seed_everything
from nanotrain.runtime.signals import Preempted, PreemptionGuard
from nanotrain.runtime.tracking import build_tracker, truncate_metrics
from nanotrain.training.guard import NonFiniteGuard
from nanotrain.training.meter import Meter, describe
from nanotrain.training.teacher import Loader

STATE_FOLDER = "state"

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


@dataclass
class _Progress:
    """What the loop knows beside the engine; saved with every state."""

    step: int = 0
    seconds: float = 0.0
    final_loss: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)


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
        Preempted: a signal asked to stop; the state is saved.
        TrainingDiverged: too many steps in a row were not finite.
    """
    seed_everything(derived_seed(run.seed, run.entry))
    return _Loop(engine, config, run, evaluate).run(loader, loss_fn)


class _Loop:
    def __init__(self, engine: Engine, config: TrainingConfig, run: Run, evaluate: Evaluate | None) -> None:
        self._engine, self._config, self._run, self._evaluate = engine, config, run, evaluate
        self._progress = self._resume()
        self._guard = NonFiniteGuard(
            config.max_nonfinite_steps, self._progress.skipped, self._progress.skipped_in_a_row
        )
        self._meter = Meter(engine, config, self._progress.seconds)
        self._saved_at = time.perf_counter()

    def _resume(self) -> _Progress:
        state = latest_resume_state(self._run.folder / STATE_FOLDER)
        progress = _Progress()
        if state is not None:
            self._engine.load_state(state[0])
            progress = _Progress(**state[1])
        truncate_metrics(self._run.folder, progress.step)
        return progress

    def run(self, loader: Loader, loss_fn: LossFn) -> TrainingSummary:
        config, run = self._config, self._run
        tracker = build_tracker(run.tracking, run.folder, f"{run.name}-{run.entry}", asdict(config))
        bar = tqdm(total=config.steps, initial=self._progress.step, desc=run.entry, unit="step", dynamic_ncols=True)
        try:
            with PreemptionGuard() as preemption, bar:
                for step in range(self._progress.step, config.steps):
                    started = time.perf_counter()
                    rate = learning_rate(step, config)
                    result = self._engine.train_step(loader.microbatches(step), loss_fn, rate)
                    self._meter.count(config.tokens_per_step, time.perf_counter() - started)
                    line = self._after_step(step + 1, result, rate)
                    if line is not None:
                        tracker.log(step + 1, line)
                        bar.set_postfix(describe(line), refresh=False)
                    bar.update(1)
                    if self._save_is_due(step + 1, preemption.received):
                        self._save()
                    if preemption.received and step + 1 < config.steps:
                        raise Preempted(preemption.received, step + 1)
        finally:
            tracker.close()
        return self._summary()

    def _after_step(self, done: int, result: StepResult, rate: float) -> dict[str, Any] | None:
        """Take stock of a step; return its line for the log where one is due."""
        self._guard.observe(done, result.skipped, result.loss, result.grad_norm)
        progress, config = self._progress, self._config
        progress.step = done
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
        if evaluated:
            assert self._evaluate is not None
            progress.evaluation = self._evaluate()
            line |= progress.evaluation
        return line

    def _save_is_due(self, done: int, signal_name: str | None) -> bool:
        waited = time.perf_counter() - self._saved_at >= self._config.save_interval_seconds
        return waited or signal_name is not None or done == self._config.steps

    def _save(self) -> None:
        self._progress.seconds = self._meter.seconds
        root = self._run.folder / STATE_FOLDER
        save_resume_state(
            root, self._progress.step, self._engine.save_state, asdict(self._progress), self._config.keep_last
        )
        self._saved_at = time.perf_counter()

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
