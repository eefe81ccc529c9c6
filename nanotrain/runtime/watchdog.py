"""Ends a process that hangs, with the stacks of all its threads, so that its launcher can start it again."""

import faulthandler
import logging
import os
import sys
import threading
import time
from types import TracebackType

EXIT_HANG = 70
_GRACE_SECONDS = 15.0
"""So much later the interpreter's own timer ends a process whose Python threads cannot run at all."""


class Watchdog:
    """While entered, `beat` must be called at least every `seconds`; 0 = no watch is kept."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = time.monotonic()
        self._doing = "starting"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """Note that the process is alive.

        Args:
            doing: what it does from now on, for the message.
        """
        self._last, self._doing = time.monotonic(), doing
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds + _GRACE_SECONDS, exit=True, file=sys.__stderr__)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self.beat(self._doing)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._seconds / 10)):
            waited = time.monotonic() - self._last
            if waited > self._seconds and not self._stop.is_set():
                logging.getLogger("nanotrain").error(
                    "no progress for %.0f s while %s (`stage.training.watchdog_seconds` is %g); this process ends, and the"
                    " stacks of its threads follow.",
                    waited,
                    self._doing,
                    self._seconds,
                )
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                os._exit(EXIT_HANG)
