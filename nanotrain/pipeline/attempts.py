"""How long an entry has worked and how much memory it took, over all its attempts, killed ones included.

A thread rewrites `attempts.json` every few seconds, so that a SIGKILL loses at most that much of the account.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanotrain.pipeline.products import ATTEMPTS_FILE
from nanotrain.runtime.files import write_json_atomic
from nanotrain.runtime.timing import peak_memory_bytes, reset_peak_memory

HEARTBEAT_SECONDS = 2.0


@dataclass
class Attempts:
    """The account of one entry."""

    fingerprint: str
    """Of the recipe and inputs that the unfinished work belongs to."""
    seconds: list[float] = field(default_factory=list)
    """Wall clock of each attempt."""
    peak_memory_bytes: int = 0
    """Largest resident set over all attempts."""


def load_attempts(folder: Path) -> Attempts | None:
    """Return the account of an entry that was started, None when there is none that can be read."""
    try:
        value: dict[str, Any] = json.loads((folder / ATTEMPTS_FILE).read_text(encoding="utf-8"))
        return Attempts(**value)
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def attempt(folder: Path, fingerprint: str) -> Iterator[Attempts]:
    """Account for the block as one more attempt at the entry in `folder`."""
    attempts = load_attempts(folder)
    if attempts is None or attempts.fingerprint != fingerprint:  # of a recipe that left no work: see status.py
        attempts = Attempts(fingerprint)
    attempts.seconds.append(0.0)
    start = time.monotonic()
    earlier_peak = attempts.peak_memory_bytes
    reset_peak_memory()
    stop = threading.Event()

    def account() -> None:
        attempts.seconds[-1] = time.monotonic() - start
        attempts.peak_memory_bytes = max(earlier_peak, peak_memory_bytes())
        write_json_atomic(folder / ATTEMPTS_FILE, attempts.__dict__)

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            account()

    account()
    heart = threading.Thread(target=beat, name="attempt-heartbeat", daemon=True)
    heart.start()
    try:
        yield attempts
    finally:
        stop.set()
        heart.join()
        account()
