"""Ends a run whose steps are skipped one after the other, before it wastes its budget."""

from nanotrain.config.errors import UserError


class TrainingDiverged(UserError):
    """Too many steps in a row were skipped for their loss or gradient; nothing of them was saved."""


class SkippedStepsGuard:
    """Counts skipped steps, in all and in a row."""

    def __init__(self, max_in_a_row: int, total: int = 0, in_a_row: int = 0) -> None:
        self._max = max_in_a_row
        self.total = total
        self.in_a_row = in_a_row

    def observe(self, step: int, skipped: bool, loss: float, grad_norm: float, spike: str | None = None) -> None:
        """Count one step; `spike` says why its loss was too large, if it was.

        Raises:
            TrainingDiverged: the limit is reached.
        """
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped
        if self.in_a_row >= self._max:
            if spike is None:
                reason = f"had a non-finite loss ({loss}) or gradient norm ({grad_norm})"
            else:
                reason = f"were skipped, and of the last one {spike}"
            raise TrainingDiverged(
                f"training diverged: {self.in_a_row} steps in a row up to step {step} {reason}, the limit of"
                f" `stage.training.max_nonfinite_steps` ({self._max}); lower `stage.training.learning_rate` or lengthen"
                " `stage.training.schedule.warmup_steps`."
            )
