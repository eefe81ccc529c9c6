"""Weights & Biases, Trackio and TensorBoard. Each is imported only when chosen, and stays on this machine by default.

A tracker knows the last step that it holds of the same run: `last_step`, 0 = none. Steps up to it need not be logged.
"""

import contextlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from nanotrain.config.engine import TrackerMode, TrackingConfig
from nanotrain.config.errors import UserError
from nanotrain.runtime.files import write_json_atomic

TRACKER_FILE = "tracker.json"
TENSORBOARD_FOLDER = "tensorboard"

Values = dict[str, float | int | bool | None]


class Tracker(Protocol):
    """Takes numbers by step."""

    def log(self, step: int, values: Values) -> None:
        """Record the values of one step; values that are not finite are recorded as missing."""
        ...

    def close(self) -> None:
        """Write out what is buffered."""
        ...


def _run_id(folder: Path) -> str:
    """Return the id of this folder's tracker run, drawn when it is first asked for."""
    file = folder / TRACKER_FILE
    if not file.exists():
        write_json_atomic(file, {"run_id": uuid.uuid4().hex[:12]})
    return str(json.loads(file.read_text(encoding="utf-8"))["run_id"])


def _missing(package: str) -> UserError:
    return UserError(
        f"`tracking.kind` ({package}) needs the package {package}, which is not installed; `pip install {package}`."
    )


class WandbTracker:
    """Online, wandb's server knows where the run stands. Offline, each attempt writes the whole run into a folder of its
    own and the older ones go, so that `wandb sync` finds one folder with every step once."""

    def __init__(self, tracking: TrackingConfig, folder: Path, run_name: str, config: dict[str, Any]) -> None:
        # Read by wandb when it is imported; its crash reports would go over the network even offline.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        run_id, online = _run_id(folder), tracking.mode is TrackerMode.online
        for earlier in [] if online else (folder / "wandb").glob(f"offline-run-*-{run_id}"):
            shutil.rmtree(earlier)
        self._run = wandb.init(
            project=tracking.project,
            name=run_name,
            id=run_id,
            resume="allow",
            mode="online" if online else "offline",
            dir=str(folder),
            config=config,
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True
            ),
        )
        self.last_step = max(self._run.step - 1, 0)  # wandb names the next step

    def log(self, step: int, values: Values) -> None:
        self._run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """Keeps its database where `trackio show` looks (TRACKIO_DIR, else trackio's cache), never on a server.

    trackio finds a run again by its name, so the name carries the id. It cannot take a step back: a step that is trained
    again keeps the numbers of the first time.
    """

    def __init__(self, tracking: TrackingConfig, folder: Path, run_name: str, config: dict[str, Any]) -> None:
        try:
            import trackio
            from trackio.sqlite_storage import SQLiteStorage
        except ImportError as error:
            raise _missing("trackio") from error
        name = f"{run_name}-{_run_id(folder)}"
        with _without_servers(), contextlib.redirect_stdout(io.StringIO()):  # it advertises its dashboard on stdout
            self._run = trackio.init(
                project=tracking.project,
                name=name,
                resume="allow",
                config=config,
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        self.last_step = SQLiteStorage.get_max_step_for_run(tracking.project, name, run_id=self._run.id) or 0

    def log(self, step: int, values: Values) -> None:
        self._run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


@contextlib.contextmanager
def _without_servers() -> Iterator[None]:
    """Hide the variables by which trackio would send its numbers away."""
    names = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_WEBHOOK_URL")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class TensorBoardTracker:
    """Event files in <entry>/tensorboard. A resumed run adds one, which purges the steps that it repeats."""

    def __init__(self, folder: Path, config: dict[str, Any], start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        target = folder / TENSORBOARD_FOLDER
        resumed = start_step > 0 and any(target.glob("events.out.tfevents.*"))
        self.last_step = start_step if resumed else 0
        """What is logged has been handed to the kernel before a state can be saved, so a kill loses nothing of it."""
        self._writer = SummaryWriter(target, purge_step=self.last_step + 1)
        if not resumed:
            text = json.dumps(config, indent=2, default=str)
            self._writer.add_text("config", f"```\n{text}\n```", global_step=0)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
