"""Finds steps whose loss stands out from those before it. Deterministic: a function of the losses alone."""

import math
import statistics
from collections import deque
from collections.abc import Sequence

from nanotrain.config.training import SpikeAction, SpikeConfig


class SpikeDetector:
    """Keeps the losses of the last steps; `history` goes into the saved progress."""

    def __init__(self, config: SpikeConfig, history: Sequence[float] = ()) -> None:
        self._config = config
        self._losses = deque(history, maxlen=config.window)

    @property
    def history(self) -> list[float]:
        """Losses of the window, oldest first."""
        return list(self._losses)

    @property
    def limit(self) -> float:
        """The largest loss that is no spike; infinite while too few are known, or when spikes are not looked for."""
        if self._config.action is SpikeAction.off or len(self._losses) < (self._config.window + 1) // 2:
            return math.inf
        deviation = statistics.pstdev(self._losses)
        # Losses that are all equal have no spread to measure in.
        return statistics.fmean(self._losses) + self._config.z_score * deviation if deviation > 0 else math.inf

    @property
    def max_loss(self) -> float:
        """What the engine is given: a step above it is left out."""
        return self.limit if self._config.action is SpikeAction.skip else math.inf

    def observe(self, loss: float) -> str | None:
        """Take in the loss of a step; return what stands out about it, if something does.

        A spike that is only logged joins the window, so that a lasting change is reported a while and then accepted; one
        that was left out or rolled back does not.
        """
        if self._config.action is SpikeAction.off or not math.isfinite(loss):
            return None
        limit = self.limit
        if loss <= limit:
            self._losses.append(loss)
            return None
        known = f"above {limit:.4f}, the mean of the last {len(self._losses)} steps plus {self._config.z_score:g} standard deviations"
        if self._config.action is SpikeAction.log:
            self._losses.append(loss)
        return f"the loss {loss:.4f} is {known}"
