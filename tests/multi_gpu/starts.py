"""Starts the ranks of a check, again without the case that ended them, and keeps the account of what came back.

NCCL ends a process whose collective does not come back, and with it all ranks: a case that hangs or crashes would take the
rest of an expensive run with it. So the ranks are children of a plain process that waits, and lists what was under way.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nanotrain.runtime.distributed import current_world, from_all, wait_for_all
from nanotrain.runtime.files import write_bytes_atomic
from tests.multi_gpu.results import Results

OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.2
MOST_WORDS = 800
"""Characters of a reason in a row."""
COMING_UP = "coming up"
"""What is under way before the first case."""


@dataclass
class Ranks:
    """One start of the ranks of a module, with the variables of torchrun; each is a child of this process.

    Attributes:
        module: run as `python -m`.
        size: ranks.
        arguments: of the module.
        environment: further variables.
    """

    module: str
    size: int
    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> "Started":
        """Start them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {
            "WORLD_SIZE": self.size,
            "LOCAL_WORLD_SIZE": self.size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes = []
        for rank in range(self.size):
            own = shared | {"RANK": rank, "LOCAL_RANK": rank}
            variables = os.environ | {name: str(value) for name, value in own.items()} | self.environment
            processes.append(subprocess.Popen([sys.executable, "-m", self.module, *self.arguments], env=variables))
        return Started(processes)


class Started:
    """Ranks that run."""

    def __init__(self, processes: "list[subprocess.Popen[bytes]]") -> None:
        self._processes = processes

    def wait(self, seconds: float, goes_on: Callable[[], bool] = lambda: True) -> int | None:
        """Return 0 when all have come through, or the exit code of the first one seen to fail, with which all are ended.

        None = they were ended after `seconds`, or because `goes_on` said no. torchrun would give the others 30 s to end,
        which one that waits in a collective never does.
        """
        deadline = time.monotonic() + seconds
        while True:
            codes = [process.poll() for process in self._processes]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                self.end()
                return failed[0] if failed else 0
            if time.monotonic() > deadline or not goes_on():
                self.end()
                return None
            time.sleep(_POLL_SECONDS)

    def end(self) -> None:
        """Leave none of them behind, nor what they have started."""
        for process in self._processes:
            end(process)


def end(process: "subprocess.Popen[Any]") -> None:
    """End a process and all that it has started."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    process.kill()
    for child in started:  # a launcher's ranks have sessions of their own
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


class Journal:
    """Which case the ranks are at and what they found, in a folder that outlives them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._under_way = folder / "under-way"
        self._done = folder / "done"

    def begin(self, case: str) -> None:
        for failure in self.folder.glob("failure-*"):
            failure.unlink()
        write_bytes_atomic(self._under_way, case.encode())

    def fail(self, reason: str) -> None:
        """Note what a rank fails by, before it tells the others, who may never come to hear it."""
        (self.folder / f"failure-{current_world().rank}").write_text(reason, encoding="utf-8")

    @property
    def failures(self) -> list[str]:
        """What ranks failed by in the case that is under way, by rank."""
        return [file.read_text(encoding="utf-8") for file in sorted(self.folder.glob("failure-*"))]

    def finish(self, case: str, *, passed: bool) -> None:
        with self._done.open("a", encoding="utf-8") as file:
            file.write(json.dumps([case, passed]) + "\n")

    @property
    def under_way(self) -> str | None:
        return self._under_way.read_text(encoding="utf-8") if self._under_way.exists() else None

    @property
    def under_way_seconds(self) -> float:
        """How long the case that began last has lasted."""
        return time.time() - self._under_way.stat().st_mtime if self._under_way.exists() else 0.0

    @property
    def done(self) -> dict[str, bool]:
        """Case -> whether it passed."""
        lines = self._done.read_text(encoding="utf-8").splitlines() if self._done.exists() else []
        return dict(json.loads(line) for line in lines)


@dataclass(frozen=True)
class Limits:
    """Seconds: of all starts together, of one case, and of what comes before the first one of a start."""

    total: float
    case: float
    first: float

    def scaled(self, factor: float) -> "Limits":
        return Limits(self.total * factor, self.case * factor, self.first * factor)


def run_cases(part: str, ranks: Ranks, cases: list[str], out: Path, journal: Journal, limits: Limits) -> bool:
    """Let the ranks go through `cases`, started anew without the one in which they ended; return whether all passed.

    Args:
        part: of the rows that are written here: of cases without an end.
        ranks: take `--cases A,B,...` and keep the journal.
        cases: in their order.
        out: file of the rows.
        journal: shared with the ranks.
        limits: of time.
    """
    results, started = Results(out), time.monotonic()

    def goes_on() -> bool:
        return journal.under_way_seconds < (limits.first if journal.under_way == COMING_UP else limits.case)

    def lost(case: str, reason: str) -> None:
        results.row(part, case, passed=False, reason=reason)
        journal.finish(case, passed=False)

    in_vain = 0
    while remaining := [case for case in cases if case not in journal.done]:
        left = limits.total - (time.monotonic() - started)
        if left <= 0 or in_vain > 1:
            reason = (
                "not run: the ranks did not come as far" if in_vain > 1 else f"not run: {limits.total:.0f} s were over"
            )
            for case in remaining:
                lost(case, "; ".join([reason, *journal.failures])[:MOST_WORDS])
            break
        journal.begin(COMING_UP)
        again = Ranks(ranks.module, ranks.size, [*ranks.arguments, "--cases", ",".join(remaining)], ranks.environment)
        code = again.start().wait(left, goes_on)
        case = journal.under_way
        in_vain = in_vain + 1 if case == COMING_UP else 0
        if case in cases and case not in journal.done:
            lost(case, "; ".join([_end_of(code, journal, started, limits), *journal.failures])[:MOST_WORDS])
    return all(journal.done.get(case, False) for case in cases)


def _end_of(code: int | None, journal: Journal, started: float, limits: Limits) -> str:
    """Say how the ranks ended in a case."""
    if code is not None:
        return f"the ranks ended in it with exit code {code}"
    after = f"the ranks were ended in it after {journal.under_way_seconds:.0f} s"
    return f"{after}, when all {limits.total:.0f} s were over" if time.monotonic() - started >= limits.total else after


def arguments_of_ranks(options: argparse.Namespace, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return what the ranks of a part are started with: words, and variables of the environment."""
    words = ["--out", str(options.out), "--journal", str(folder), *(["--cpu"] if options.cpu else [])]
    return words, ({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if options.cpu else {})


def chosen(names: Sequence[str], only: str) -> list[str]:
    """Return the names that have one of the words of `only`, which have commas between them; none = all."""
    return [name for name in names if not only or any(word in name for word in only.split(","))]


def attempts(
    part: str, cases: Sequence[str], results: Results, journal: Journal, run: Callable[[str], dict[str, Any]]
) -> Iterator[bool]:
    """Go through cases on every rank; what one of them raises is the case's, where the others come through it too.

    Args:
        part: of the rows.
        cases: names.
        results: of the rows.
        journal: told by the first rank.
        run: returns a case's row with `passed`; the first rank's is written.

    Yields:
        Whether the case passed.
    """
    first = current_world().is_first
    for case in cases:
        if first:
            journal.begin(case)
        started, row, failure = time.perf_counter(), {"passed": False}, None
        try:
            row = run(case)
        except Exception as error:  # whatever it is, it is written down and the next case runs
            failure = f"{type(error).__name__}: {error}"
            sys.stderr.write(f"{part}, {case}:\n{traceback.format_exc()}")
            journal.fail(failure)
        failures = [text for text in from_all(failure) if text is not None]
        if failures:
            row = {"passed": False, "reason": failures[0][:MOST_WORDS]}
        results.row(part, case, **row, seconds=round(time.perf_counter() - started, 2))
        if first:
            journal.finish(case, passed=bool(row["passed"]))
        yield bool(row["passed"])


def leave() -> int:
    """End this rank when all have come here; groups of many layouts are not taken down one by one, which may hang.

    What passed is in the rows: a rank that came through ends with 0.
    """
    wait_for_all()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def main(work: Callable[[argparse.Namespace], int]) -> int:
    """Read the options of a part's process, or of one of its ranks, and return the exit code of its work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    parser.add_argument("--cpu", action="store_true", help="rehearse on CPU ranks with tiny shapes")
    parser.add_argument("--gpus", type=int, help="ranks that are started")
    parser.add_argument(
        "--only", default="", help="cases whose names have one of these words, with commas between them"
    )
    parser.add_argument("--cases", help="of a rank: what to go through")
    parser.add_argument("--journal", type=Path, help="of a rank: folder that it shares with the others")
    return work(parser.parse_args())


def summary(done: dict[str, bool], out: Path) -> int:
    """Print a line for each case out of its row; return the exit code."""
    rows = {row["name"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    for name, passed in done.items():
        row = rows[name]
        words = [f"{row['seconds']:6.1f} s" if "seconds" in row else " " * 8]
        for steps in ("first_step", "all_steps"):
            if steps in row:
                words.append(f"{steps.replace('_', ' ')} {row[steps]['loss']:.1e} / {row[steps]['gradient_norm']:.1e}")
        print(f"{'passed' if passed else 'FAILED':7} {name:32} {' '.join(words)}  {row.get('reason', '')[:120]}")
    return 0 if all(done.values()) else 1
