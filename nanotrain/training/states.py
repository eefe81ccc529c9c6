"""When the loop saves its state, and how it comes back to one."""

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nanotrain.checkpoint.resume import latest_resume_state, list_states
from nanotrain.checkpoint.saver import SaveFailedError, StateSaver
from nanotrain.config.errors import UserError
from nanotrain.config.training import SaveFailure, TrainingConfig
from nanotrain.engines.base import Engine

log = logging.getLogger("nanotrain")

STATE_FOLDER = "state"


@dataclass
class LoopProgress:
    """What the loop knows beside the engine; saved with every state."""

    step: int = 0
    seconds: float = 0.0
    final_loss: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    """Window of the spike detector."""
    rolled_back: list[list[int]] = field(default_factory=list)
    """[first, last] step of every stretch whose updates were taken back."""


class States:
    """The resumable states of one training; every rank calls the methods at the same steps."""

    def __init__(self, engine: Engine, config: TrainingConfig, folder: Path) -> None:
        self._engine, self._config, self._root = engine, config, folder / STATE_FOLDER
        self._saver = StateSaver(self._root, config.keep_last, config.keep_every)
        self._saved_at = time.perf_counter()
        self._saved_step = 0
        self.stall_seconds = 0.0
        """Time that training stood still for saves; the reader of it sets it back."""

    def resume(self) -> LoopProgress:
        """Load the newest intact state, if there is one."""
        found = latest_resume_state(self._root)
        if found is None:
            return LoopProgress()
        self._engine.load_state(found[0])
        progress = LoopProgress(**found[1])
        self._saved_step = progress.step
        return progress

    @property
    def due_by_time(self) -> bool:
        """Whether this rank's clock asks for a save; the first rank's counts."""
        return time.perf_counter() - self._saved_at >= self._config.save_interval_seconds

    @property
    def writing(self) -> bool:
        """Whether this rank still writes."""
        return self._saver.busy

    def due_by_step(self, step: int) -> bool:
        """Whether `step` must have a state of its own: the last, and those of `keep_every`."""
        every = self._config.keep_every
        return step == self._config.steps or bool(every and step % every == 0)

    def save(self, progress: LoopProgress) -> None:
        """Wait for a save in flight, copy the state and have it written in the background."""
        started = time.perf_counter()
        self.settle()
        self._saver.start(progress.step, self._engine.snapshot_state(), asdict(progress))
        self._saved_at = time.perf_counter()
        self._saved_step = progress.step
        self.stall_seconds += self._saved_at - started

    @property
    def newest_step(self) -> int:
        """Step of the newest state on the disk, 0 when there is none."""
        states = list_states(self._root)
        return states[-1][0] if states else 0

    def settle(self) -> bool:
        """Wait for the save in flight and return whether it was stored; what went wrong is said.

        Raises:
            UserError: storage refused it, and `on_save_failure` is stop.
        """
        try:
            self._saver.finish()
        except SaveFailedError as failure:
            newest = self.newest_step
            left = f"the newest intact one is that of step {newest}" if newest else "there is none yet"
            sentence = f"the state of step {self._saved_step} could not be saved ({failure}); {left}"
            if self._config.on_save_failure is SaveFailure.stop:
                raise UserError(
                    f"{sentence}. Make room below {self._root} and run the same command again, or set"
                    " `stage.training.on_save_failure` to warn."
                ) from failure
            log.warning("%s; training goes on.", sentence)
            return False
        return True

    def roll_back(self) -> int | None:
        """Load the newest state of a step that `keep_every` divides and return its step; None when there is none."""
        self.settle()
        found = latest_resume_state(self._root, keep_every=self._config.keep_every)
        if found is None:
            return None
        self._engine.load_state(found[0])
        return int(found[1]["step"])

    def close(self) -> None:
        """Give a save in flight a while to end; for a run that ends by an error."""
        self._saver.close()
