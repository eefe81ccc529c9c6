"""Where the numbers of a run go: metrics.jsonl always, one tracker on top by choice (runtime/trackers.py).

metrics.jsonl is the record and the tracker a view of it: a resumed run first tells its tracker the lines that it lacks.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

from nanotrain.config.engine import TrackerKind, TrackingConfig
from nanotrain.runtime.distributed import current_world
from nanotrain.runtime.files import STORAGE_ERRORS, write_bytes_atomic
from nanotrain.runtime.trackers import TensorBoardTracker, Tracker, TrackioTracker, Values, WandbTracker

log = logging.getLogger("nanotrain")

METRICS_FILE = "metrics.jsonl"


def build_tracker(
    tracking: TrackingConfig, folder: Path, run_name: str, config: dict[str, Any], start_step: int = 0
) -> Tracker:
    """Return a tracker that writes `folder`/metrics.jsonl and the chosen tracker; on other ranks than the first, nothing.

    A run that is resumed in the same folder continues the same tracker run, and no step is in it twice.

    Args:
        tracking: which tracker.
        folder: of the entry; offline data lands below it.
        run_name: shown by the tracker.
        config: shown by the tracker.
        start_step: steps done; metrics.jsonl ends there (`truncate_metrics`).

    Raises:
        UserError: the tracker's package is missing.
    """
    if not current_world().is_first:
        return _All([])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / METRICS_FILE
    trackers: list[Tracker] = [_MetricsFile(file)]
    chosen = _chosen(tracking, folder, run_name, config, start_step)
    if chosen is not None:
        for line in _lines(file):
            if line["step"] > chosen.last_step:
                chosen.log(line.pop("step"), line)
        trackers.append(_NoStepTwice(chosen))
    return _All(trackers)


def _chosen(
    tracking: TrackingConfig, folder: Path, run_name: str, config: dict[str, Any], start_step: int
) -> "WandbTracker | TrackioTracker | TensorBoardTracker | None":
    if tracking.kind is TrackerKind.wandb:
        return WandbTracker(tracking, folder, run_name, config)
    if tracking.kind is TrackerKind.trackio:
        return TrackioTracker(tracking, folder, run_name, config)
    if tracking.kind is TrackerKind.tensorboard:
        return TensorBoardTracker(folder, config, start_step)
    return None


def truncate_metrics(folder: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step` (and one cut off by a kill), so that a resumed run repeats none."""
    file = folder / METRICS_FILE
    if file.exists():
        kept = [json.dumps(line) + "\n" for line in _lines(file) if line["step"] <= step]
        write_bytes_atomic(file, "".join(kept).encode())


def _lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines that a kill has not cut off; nothing after a damaged one is in order."""
    found = []
    for line in file.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was cut off
        try:
            values = json.loads(line)
            int(values["step"])
        except (ValueError, KeyError, TypeError):
            break
        found.append(values)
    return found


class _All:
    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, values: Values) -> None:
        finite = {name: _finite_or_none(value) for name, value in values.items()}
        for tracker in self._trackers:
            tracker.log(step, finite)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def _finite_or_none(value: float | int | bool | None) -> float | int | bool | None:
    """JSON has no NaN: a missing number is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _NoStepTwice:
    """Leaves out steps that the tracker holds from an attempt that was cut off."""

    def __init__(self, tracker: "WandbTracker | TrackioTracker | TensorBoardTracker") -> None:
        self._tracker = tracker

    def log(self, step: int, values: Values) -> None:
        if step > self._tracker.last_step:
            self._tracker.log(step, values)

    def close(self) -> None:
        self._tracker.close()


class _MetricsFile:
    """One JSON object a line, handed to the kernel line by line: a kill of the process loses none.

    Lines for which a disk has no room wait in memory until it has.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._waiting = b""
        self._file.touch()

    def log(self, step: int, values: Values) -> None:
        self._waiting += (json.dumps({"step": step, **values}, allow_nan=False) + "\n").encode()
        had_room = self._waiting.count(b"\n") == 1
        reason = self._write()
        if reason is not None and had_room:
            log.warning("%s cannot be written (%s); its lines wait in memory.", self._file, reason)

    def _write(self) -> str | None:
        """Append what waits, as far as there is room; return what is in the way."""
        try:
            with open(self._file, "ab", buffering=0) as handle:
                while self._waiting:
                    self._waiting = self._waiting[handle.write(self._waiting) :]
        except OSError as error:
            if error.errno not in STORAGE_ERRORS:
                raise
            return error.strerror
        return None

    def close(self) -> None:
        reason = self._write() if self._waiting else None
        if reason is not None:
            lines = self._waiting.count(b"\n")
            log.warning("%s: the last %d lines are lost (%s).", self._file, lines, reason)
