"""An online teacher: its hidden states join the micro-batches before the step, never from inside a loss (decision 0001)."""

import time
from dataclasses import replace
from typing import Protocol

from nanotrain.engines.base import Engine
from nanotrain.model.batch import MicroBatch


class Loader(Protocol):
    """What the loop needs of a loader; data/loader.py has those that read from disk."""

    def microbatches(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of one optimizer step; the same step gives the same batches."""
        ...


class TeacherLoader:
    """Wraps a loader and fills in `teacher_hidden_states`."""

    def __init__(self, loader: Loader, teacher: Engine) -> None:
        self._loader = loader
        self._teacher = teacher
        self.teacher_seconds = 0.0
        """Of the last call, in the teacher's forward passes; a GPU goes on with them after it."""

    def microbatches(self, step: int) -> list[MicroBatch]:
        """Return the step's micro-batches with the teacher's last hidden states [B, S, D_teacher]."""
        batches = self._loader.microbatches(step)
        started = time.perf_counter()
        hidden_states = self._teacher.hidden_states(batches)
        self.teacher_seconds = time.perf_counter() - started
        return [replace(batch, teacher_hidden_states=h) for batch, h in zip(batches, hidden_states, strict=True)]
