"""Stopping in good order: a signal sets a flag, the loop saves at the next step border and raises Preempted."""

import signal
import threading
from types import FrameType, TracebackType

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What schedulers send before they kill (SLURM: SIGTERM, or SIGUSR1 by `--signal`), and Ctrl-C."""


class Preempted(Exception):
    """A signal asked the run to stop, and its work is saved; the command line exits with 75."""

    def __init__(self, signal_name: str, step: int) -> None:
        super().__init__(f"stopped by {signal_name} and saved at step {step}; run the same command again to continue.")
        self.signal_name = signal_name
        self.step = step


class Terminated(BaseException):
    """A scheduler's signal outside the training loop, which has a handler of its own.

    Such stages have written every finished work item already, so stopping at once loses no more than one item.
    """


def terminate(number: int, frame: FrameType | None) -> None:
    """Handle a signal by raising Terminated."""
    raise Terminated


class PreemptionGuard:
    """While entered, the first signal is remembered in `received`; a second Ctrl-C interrupts at once.

    Outside the main thread Python cannot install handlers; the guard then never reports a signal.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal that arrived."""
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "PreemptionGuard":
        if threading.current_thread() is threading.main_thread():
            for number in PREEMPTION_SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None = the handler was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number).name
