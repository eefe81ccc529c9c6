"""What a run on N ranks survives: states under other layouts and on fewer ranks, saves, a killed rank.

    bash launch/test_multi_gpu.sh faults

Ranks for states that move and for saves (reshard.py); then half of the ranks and one, beside each other, on what all of them
have saved; then the command line, whose ranks are killed (killed.py). This process is none of the ranks.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.multi_gpu.killed import Kills
from tests.multi_gpu.moves import PART, cases_of, fewer_ranks
from tests.multi_gpu.results import Results
from tests.multi_gpu.shapes import CPU, GPU, patience
from tests.multi_gpu.starts import (
    Journal,
    Limits,
    Ranks,
    arguments_of_ranks,
    attempts,
    chosen,
    main,
    run_cases,
    summary,
)

LIMITS = Limits(total=115.0, case=100.0, first=90.0)
FEWER_SECONDS = 60.0
KILLS = ("kills: undisturbed", "kills: one of all", "kills: fewer go on")
KILLS_LATEST = 185.0
"""Seconds after which no further command is started."""


@contextmanager
def on_fewer_ranks(options: argparse.Namespace, journal: Journal) -> Iterator[None]:
    """Let half of the ranks, and one, go on with what all have saved, on GPUs of their own, beside what the caller does."""
    shape, first, started = CPU if options.cpu else GPU, 0, []
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(options.gpus)))).split(",")
    for size in sorted({max(options.gpus // 2, 1), 1}, reverse=True):
        names = chosen(list(fewer_ranks(shape, size)), options.only)
        if not names:
            continue
        own = Journal(journal.folder / f"on-{size}")
        own.folder.mkdir()
        (own.folder / "fsdp2").symlink_to(journal.folder / "fsdp2")
        words, environment = arguments_of_ranks(options, own.folder)
        if not options.cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + size])
        first += size
        ranks = Ranks("tests.multi_gpu.reshard", size, [*words, "--cases", names[0]], environment)
        started.append((names[0], own, ranks.start()))
    deadline = time.monotonic() + FEWER_SECONDS * patience(cpu=options.cpu)
    try:
        yield
    finally:
        for name, own, ranks in started:
            code = ranks.wait(max(deadline - time.monotonic(), 1.0))
            if name not in own.done:
                reason = "; ".join([f"the ranks ended in it with exit code {code}", *own.failures])
                Results(options.out).row(PART, name, passed=False, reason=reason)
            journal.finish(name, passed=own.done.get(name, False))


def conduct(options: argparse.Namespace) -> int:
    """Start ranks and commands one after the other and print the table."""
    started, factor, results = time.monotonic(), patience(cpu=options.cpu), Results(options.out)
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder))
        names = chosen(list(cases_of(CPU if options.cpu else GPU, options.gpus)), options.only)
        ranks = Ranks("tests.multi_gpu.reshard", options.gpus, *arguments_of_ranks(options, journal.folder))
        run_cases(PART, ranks, names, options.out, journal, LIMITS.scaled(factor))
        kills = Kills(journal.folder / "kills", options.gpus, cpu=options.cpu)
        work = dict(zip(KILLS, (kills.undisturbed, kills.killed, kills.fewer), strict=True))

        def run(name: str) -> dict[str, object]:
            assert time.monotonic() - started < KILLS_LATEST * factor, (
                f"not run: {KILLS_LATEST * factor:.0f} s were over"
            )
            return work[name]()

        def command_lines(names: Sequence[str]) -> None:
            for _ in attempts(PART, chosen(names, options.only), results, journal, run):
                pass

        with on_fewer_ranks(options, journal):
            command_lines(KILLS[:1])
        command_lines(KILLS[1:])
        return summary(journal.done, options.out)


if __name__ == "__main__":
    sys.exit(main(conduct))
