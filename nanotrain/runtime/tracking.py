"""Where the numbers of a run go: metrics.jsonl always, one tracker on top by choice.

Trackers are imported only when chosen. wandb is offline unless asked otherwise; trackio is local by nature.
"""

import contextlib
import io
import json
import math
import os
import uuid
from pathlib import Path
from typing import Any, Protocol

from nanotrain.config.engine import TrackerKind, TrackerMode, TrackingConfig
from nanotrain.config.errors import UserError
from nanotrain.runtime.files import write_bytes_atomic, write_json_atomic

METRICS_FILE = "metrics.jsonl"
TRACKER_FILE = "tracker.json"

Values = dict[str, float | int | bool | None]


class Tracker(Protocol):
    """Takes numbers by step."""

    def log(self, step: int, values: Values) -> None:
        """Record the values of one step; values that are not finite are recorded as missing."""
        ...

    def close(self) -> None:
        """Write out what is buffered."""
        ...


def build_tracker(
    tracking: TrackingConfig, folder: Path, run_name: str, config: dict[str, Any], start_step: int = 0
) -> Tracker:
    """Return a tracker that writes `folder`/metrics.jsonl and the chosen tracker.

    A run that is resumed in the same folder continues the same tracker run: its id is kept in tracker.json.

    Args:
        tracking: which tracker.
        folder: of the entry; offline data lands below it.
        run_name: shown by the tracker.
        config: shown by the tracker.
        start_step: steps done; what a tracker holds of later ones, from an attempt that was cut off, is replaced.

    Raises:
        UserError: the tracker's package is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trackers: list[Tracker] = [_MetricsFile(folder / METRICS_FILE)]
    if tracking.kind is TrackerKind.wandb:
        trackers.append(_Wandb(tracking, folder, run_name, config))
    elif tracking.kind is TrackerKind.trackio:
        trackers.append(_Trackio(tracking, folder, run_name, config))
    elif tracking.kind is TrackerKind.tensorboard:
        trackers.append(_TensorBoard(folder, config, start_step))
    return _All(trackers)


def truncate_metrics(folder: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step` (and one cut off by a kill), so that a resumed run repeats none."""
    file = folder / METRICS_FILE
    if not file.exists():
        return
    kept = []
    for line in file.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was cut off
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            break  # nothing after a damaged line is in order
        if keep:
            kept.append(line + b"\n")
    write_bytes_atomic(file, b"".join(kept))


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


class _MetricsFile:
    """One JSON object a line, handed to the kernel line by line: a kill of the process loses none."""

    def __init__(self, file: Path) -> None:
        self._handle = open(file, "a", encoding="utf-8")  # noqa: SIM115 - open for the life of the run

    def log(self, step: int, values: Values) -> None:
        self._handle.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._handle.flush()

    def close(self) -> None:
        self._handle.close()


def _tracker_run_id(folder: Path) -> str:
    """Return the id of this folder's tracker run, drawn when it is first asked for."""
    file = folder / TRACKER_FILE
    if not file.exists():
        write_json_atomic(file, {"run_id": uuid.uuid4().hex[:12]})
    return str(json.loads(file.read_text(encoding="utf-8"))["run_id"])


class _Wandb:
    def __init__(self, tracking: TrackingConfig, folder: Path, run_name: str, config: dict[str, Any]) -> None:
        # Read by wandb when it is imported; its crash reports would go over the network even offline.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "`tracking.kind` (wandb) needs the package wandb, which is not installed; `pip install wandb`."
            ) from error
        self._run = wandb.init(
            project=tracking.project,
            name=run_name,
            id=_tracker_run_id(folder),
            resume="allow",
            mode="online" if tracking.mode is TrackerMode.online else "offline",
            dir=str(folder),
            config=config,
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True
            ),
        )

    def log(self, step: int, values: Values) -> None:
        self._run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """Keeps its database where `trackio show` looks (TRACKIO_DIR, else trackio's cache).

    trackio finds a run again by its name, so the name carries the id.
    """

    def __init__(self, tracking: TrackingConfig, folder: Path, run_name: str, config: dict[str, Any]) -> None:
        try:
            import trackio
        except ImportError as error:
            raise UserError(
                "`tracking.kind` (trackio) needs the package trackio, which is not installed; `pip install trackio`."
            ) from error
        with contextlib.redirect_stdout(io.StringIO()):  # it advertises its dashboard on stdout
            self._run = trackio.init(
                project=tracking.project,
                name=f"{run_name}-{_tracker_run_id(folder)}",
                resume="allow",
                config=config,
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, step: int, values: Values) -> None:
        self._run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


class _TensorBoard:
    """Event files below <entry>/tensorboard; a resumed run adds one, which hides what it repeats."""

    def __init__(self, folder: Path, config: dict[str, Any], start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "`tracking.kind` (tensorboard) needs the package tensorboard, which is not installed;"
                " `pip install tensorboard`."
            ) from error
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1)
        if start_step == 0:
            self._writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
