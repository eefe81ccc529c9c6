"""Saves resumable states in the background: the snapshot is taken at once, a thread writes it while training goes on.

Every rank has a thread of its own; they agree over a channel of their own, so that a state is renamed into place only when
all have written their part, and fails on all of them when it fails on one.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from nanotrain.checkpoint.resume import (
    DIGESTS_FILE,
    ENGINE_FOLDER,
    PROGRESS_FILE,
    list_states,
    remove_state,
    shares,
    state_files,
)
from nanotrain.runtime.distributed import Channel, current_world, open_channel
from nanotrain.runtime.files import file_digest, fsync_folder, storage_refuses, write_synced

CLOSE_SECONDS, CLOSE_SECONDS_OF_RANKS = 60.0, 5.0
"""A run that ends by an error waits so long for a save in flight; less where it may be another rank that has died, because
the save then never ends, and the ranks that are still alive wait for this one's connections to close."""


class SaveFailedError(Exception):
    """A state could not be stored, because a disk is full, read-only or gone; the states before it are intact."""


@dataclass(frozen=True)
class _Failure:
    rank: int
    reason: str
    of_storage: bool
    """False = a defect of ours."""


class StateSaver:
    """Writes states below `root`, one at a time. Built, and called, on every rank at the same steps."""

    def __init__(self, root: Path, keep_last: int, keep_every: int = 0) -> None:
        """Open the channel of the writing threads.

        Args:
            root: the entry's `state` folder.
            keep_last: number of newest states kept, at least 1.
            keep_every: states of a step that this divides are kept for good; 0 = none.
        """
        self._root, self._keep_last, self._keep_every = root, keep_last, keep_every
        self._channel: Channel = open_channel()
        self._tag = self._channel.from_first(os.getpid())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, write_engine: Callable[[Path], None], progress: dict[str, Any]) -> None:
        """Write the state after `step` steps in the background.

        Args:
            step: optimizer steps done.
            write_engine: this rank's writer of its snapshot (engines.base.StateWriter).
            progress: what the loop needs beside the engine, as JSON; the first rank's is stored.
        """
        assert self._thread is None, "a save is in flight"

        def work() -> None:
            try:
                self._save(step, write_engine, progress)
            except BaseException as error:
                self._error = error
                if not isinstance(error, Exception):
                    raise

        self._thread = threading.Thread(target=work, name=f"save-{step}", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the save in flight, if there is one.

        Raises:
            SaveFailedError: storage refused it.
            RuntimeError: it failed by a defect, of this rank or another.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Give a save in flight a while to end; for a run that ends by an error of its own."""
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS if current_world().size == 1 else CLOSE_SECONDS_OF_RANKS)

    def _save(self, step: int, write_engine: Callable[[Path], None], progress: dict[str, Any]) -> None:
        channel, first = self._channel, current_world().is_first
        final = self._root / f"step-{step:08d}"
        temporary = self._root / f".step-{step:08d}.{self._tag}.tmp"
        try:
            with self._agreed():
                if first:
                    shutil.rmtree(temporary, ignore_errors=True)
                    (temporary / ENGINE_FOLDER).mkdir(parents=True)
                    write_synced(temporary / PROGRESS_FILE, json.dumps(progress).encode())
            with self._agreed():
                write_engine(temporary / ENGINE_FOLDER)
            digests: dict[str, str] = {}
            with self._agreed():
                for name in shares(channel.from_first(state_files(temporary) if first else [])):
                    with open(temporary / name, "rb") as handle:
                        os.fsync(handle.fileno())
                    digests[name] = file_digest(temporary / name)
            merged = {name: digest for part in channel.from_all(digests) for name, digest in part.items()}
            with self._agreed():
                if first:
                    self._put_in_place(temporary, final, merged)
        except Exception:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _put_in_place(self, temporary: Path, final: Path, digests: dict[str, str]) -> None:
        text = json.dumps(digests, indent=2, sort_keys=True)
        write_synced(temporary / DIGESTS_FILE, text.encode())
        for path in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            fsync_folder(path)
        if final.exists():  # a step that was rolled back and came again
            shutil.rmtree(final)
        os.replace(temporary, final)
        fsync_folder(self._root)
        states = list_states(self._root)
        for number, old in states[: -self._keep_last]:
            if not (self._keep_every and number % self._keep_every == 0):
                remove_state(old)

    def _agreed(self) -> "_Agreed":
        """A part of the work, done on every rank: it failed on all when it failed on one."""
        return _Agreed(self._channel, lambda: storage_refuses(self._root))


class _Agreed:
    """Ends the block on all ranks in the same way."""

    def __init__(self, channel: Channel, storage_refuses: Callable[[], bool]) -> None:
        self._channel, self._storage_refuses = channel, storage_refuses

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = None
        if error is not None:
            of_storage = isinstance(error, OSError) or self._storage_refuses()
            failure = _Failure(current_world().rank, f"{type(error).__name__}: {error}", of_storage)
        failures = [one for one in self._channel.from_all(failure) if one is not None]
        if not failures:
            return
        words = "; ".join(f"rank {one.rank}: {one.reason}" for one in failures)
        if all(one.of_storage for one in failures):
            raise SaveFailedError(words) from error
        raise RuntimeError(f"a state could not be saved ({words})") from error
