"""Kills runs at random moments until they are through, and compares their ends with an undisturbed one's.

python -m tests.end_to_end.campaign OUT.jsonl ENGINE:RANKS:KILLS[:SECONDS] ...     ENGINE of rank_engines.py
python -m tests.end_to_end.campaign OUT.jsonl                                      the account as a table

OUT.jsonl gets a line for every run that was brought to its end. The kills of a configuration that it has already count:
the same command goes on where it was stopped.
"""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nanotrain.checkpoint.resume import find_defect
from nanotrain.runtime.rank_process import end_with
from tests.end_to_end.rank_engines import ENGINES, RankEngine
from tests.end_to_end.ranks_of_a_run import (
    RECIPE,
    ROOT,
    Ranks,
    digest_of_run,
    make_wheels,
    preload,
    settings,
    warm_up,
)

MAX_END_SECONDS = 60.0
"""All ranks must have ended so long after one was killed."""
MAX_ATTEMPTS = 400
OWN_NAMES = (".lock", ".metadata")
"""Of the run, and of Megatron's states; every other name with a dot is a temporary one."""
STEPS = 8
LONG_FORM = {
    **{f"{engine}:2": 12 for engine in ("ddp", "fsdp2", "zero1", "zero3", "megatron_tp2", "megatron_pp2")},
    **{f"{engine}:4": 20 for engine in ("ddp", "fsdp2", "zero1", "zero3", "megatron", "megatron_tp2", "megatron_pp2")},
}
"""Kills by engine and ranks."""


@dataclass
class Outcome:
    """What a campaign did and saw."""

    kills: int = 0
    polite: int = 0
    """Of these, signals that ask to stop."""
    runs: int = 0
    """Runs brought to their end."""
    moments: Counter[str] = field(default_factory=Counter)
    """Kills by the entry that was being worked on; `/save` where a state was half written."""
    longest_end_seconds: float = 0.0
    states_checked: int = 0

    def add(self, other: "Outcome") -> None:
        """Take in what `other` counted."""
        self.kills += other.kills
        self.polite += other.polite
        self.runs += other.runs
        self.moments.update(other.moments)
        self.longest_end_seconds = max(self.longest_end_seconds, other.longest_end_seconds)
        self.states_checked += other.states_checked


class Campaign:
    """One recipe on one number of ranks."""

    def __init__(
        self,
        arguments: list[str],
        size: int,
        wheels: dict[str, Path],
        folder: Path,
        engine: RankEngine = ENGINES["ddp"],
        seed: int = 0,
    ) -> None:
        self._arguments, self._size, self._wheels, self._folder = arguments, size, wheels, folder
        self._engine = engine
        self._chance = random.Random(f"{seed}-{size}")
        self._number = 0
        warm_up()
        started = time.monotonic()
        self.expected = self._run_undisturbed()
        self.calm_seconds = time.monotonic() - started

    def _start(self, output: Path) -> Ranks:
        arguments = [*self._arguments, f"output_dir='{output}'"]
        return Ranks(arguments, self._size, self._wheels, self._folder / "logs", megatron=self._engine.is_megatron)

    def _run_undisturbed(self) -> dict[str, Any]:
        output = self._folder / "calm"
        ranks = self._start(output)
        try:
            codes = ranks.wait(240)
            assert codes == [0] * self._size, (codes, ranks.output[-3000:])
        finally:
            ranks.kill()
        return digest_of_run(output)

    def run(
        self, kills: int, seconds: float = math.inf, through: Callable[[Outcome], None] = lambda outcome: None
    ) -> Outcome:
        """Start runs and kill them until so many kills were made, or so long; the last run is brought to its end.

        Args:
            kills: at least so many, unless the time is up.
            seconds: no kill comes later.
            through: called with the outcome of each run that came to its end.
        """
        deadline = time.monotonic() + seconds
        total = Outcome()
        while total.kills < kills and time.monotonic() < deadline:
            outcome = self._run_through(kills - total.kills, deadline)
            through(outcome)
            total.add(outcome)
        return total

    def _run_through(self, kills: int, deadline: float) -> Outcome:
        """Bring one run to its end with at most so many kills."""
        output = self._folder / f"stormy-{self._number}"
        self._number += 1
        outcome, attempts = Outcome(), 0
        while not self._attempt(output, outcome, disturb=outcome.kills < kills and time.monotonic() < deadline):
            attempts += 1
            assert attempts < MAX_ATTEMPTS, "the run makes no progress between kills"
        found = digest_of_run(output)
        assert found == self.expected, {
            key: (found[key], self.expected[key]) for key in found if found[key] != self.expected[key]
        }
        leftovers = [path for path in output.rglob(".*") if path.name not in OWN_NAMES]
        assert not leftovers, leftovers
        shutil.rmtree(output)
        outcome.runs = 1
        return outcome

    def _attempt(self, output: Path, outcome: Outcome, disturb: bool) -> bool:
        """Start the run once; return True when it came to its end."""
        ranks = self._start(output)
        try:
            # The patience grows, so that a loaded machine cannot starve the run.
            grown = 1 + outcome.kills / 10
            patience = self.calm_seconds * self._chance.uniform(0.05, 0.4) * grown if disturb else 240.0
            if self._ended_by_itself(ranks, patience):
                return True
            if not disturb:
                ranks.print_stacks()
                raise AssertionError(f"the run hangs\n{ranks.output[-9000:]}")
            self._kill(ranks, output, outcome)
            return False
        finally:
            ranks.kill()

    def _ended_by_itself(self, ranks: Ranks, patience: float) -> bool:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if ranks.any_ended():
                codes = ranks.wait(30)
                assert codes == [0] * self._size, (codes, ranks.output[-3000:])
                return True
            time.sleep(0.005)
        return False

    def _kill(self, ranks: Ranks, output: Path, outcome: Outcome) -> None:
        moment = _moment(output)
        outcome.moments[moment] += 1
        outcome.kills += 1
        started = time.monotonic()
        polite = self._chance.random() < 0.2
        if polite:
            outcome.polite += 1
            ranks.signal(self._chance.choice([signal.SIGTERM, signal.SIGUSR1]), rank=None)
        else:
            ranks.signal(signal.SIGKILL, rank=self._chance.randrange(self._size))
            ranks.signal(signal.SIGTERM)  # what torchrun's agent does with the others
        codes = ranks.wait(MAX_END_SECONDS)
        outcome.longest_end_seconds = max(outcome.longest_end_seconds, time.monotonic() - started)
        if codes is None:
            ranks.print_stacks()
            raise AssertionError(
                f"a rank goes on without the others (a polite signal: {polite})\n{ranks.output[-9000:]}"
            )
        _, left = psutil.wait_procs(ranks.processes_left(), timeout=10)
        assert not left, ("the ranks left processes behind", [one.cmdline() for one in left])
        if polite:
            # A signal may reach a rank before its handlers are there, and some ranks when they are through already.
            allowed = {75, 0, -signal.SIGTERM, -signal.SIGUSR1}
            assert not output.exists() or allowed & set(codes), (codes, ranks.output[-3000:])
            nothing_left = moment in ("export", "between entries")
            assert nothing_left or any(codes), ("the run went on to its end", moment, ranks.output[-3000:])
        for state in output.glob("*/state/step-*"):
            assert find_defect(state) is None, f"{state} is incomplete under its final name"
            outcome.states_checked += 1


def _moment(output: Path) -> str:
    """Return the entry that is being worked on."""
    started = [folder for folder in output.glob("*") if folder.is_dir() and not (folder / "stage.json").exists()]
    if not started:
        return "start" if not output.exists() else "between entries"
    entry = max(started, key=lambda folder: folder.stat().st_mtime)
    saving = any((entry / "state").glob(".step-*.tmp"))
    return f"{entry.name}/save" if saving else entry.name


def run_configuration(out: Path, name: str, size: int, kills: int, seconds: float) -> None:
    """Kill runs of one engine until `out` counts so many kills of it, and append each run that is through.

    Belongs into a process of its own.
    """
    end_with(os.getppid())
    engine = ENGINES[name]
    earlier = [row for row in rows_of(out) if (row["engine"], row["ranks"]) == (name, size)]
    remaining = kills - sum(row["kills"] for row in earlier)
    if remaining <= 0:
        return
    commit = _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "nanotrain", "tests") else "")
    folder = Path(tempfile.mkdtemp(prefix=f"campaign-{name}-{size}-"))  # stays there when something is wrong
    preload(engine)
    (folder / "wheels").mkdir()
    wheels = make_wheels(folder / "wheels")
    arguments = ["run", RECIPE, *settings(STEPS, 1e-6, engine)]
    campaign = Campaign(arguments, size, wheels, folder, engine, seed=len(earlier))
    print(f"{name} on {size} ranks ({engine.layout(size)}): undisturbed {campaign.calm_seconds:.1f} s", flush=True)
    last = time.monotonic()

    def append(outcome: Outcome) -> None:
        nonlocal last
        now, about = time.monotonic(), {"engine": name, "layout": engine.layout(size), "ranks": size, "commit": commit}
        row = about | vars(outcome) | {"seconds": round(now - last, 1), "load": round(os.getloadavg()[0], 1)}
        last = now
        print(row, flush=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    campaign.run(remaining, seconds, append)
    shutil.rmtree(folder)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the runs that an account has."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def outcome_of(row: dict[str, Any]) -> Outcome:
    """Return what a line of the account counted."""
    values = {name: row[name] for name in Outcome.__dataclass_fields__}
    return Outcome(**values | {"moments": Counter(row["moments"])})


def table(rows: list[dict[str, Any]]) -> str:
    """Return the account, a line for each engine and number of ranks."""
    lines = [
        "| engine | ranks | kills | of these polite | while a state was written | runs through | states checked |"
        " longest end, s | kills by entry |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    total = Outcome()
    sums: dict[tuple[str, str], Outcome] = {}
    for row in rows:
        sums.setdefault((row["engine"], f"{row['ranks']} ({row['layout']})"), Outcome()).add(outcome_of(row))
        total.add(outcome_of(row))
    for (engine, ranks), outcome in [*sorted(sums.items()), (("all", ""), total)]:
        entries: Counter[str] = Counter()
        for moment, count in outcome.moments.items():
            entries[moment.removesuffix("/save")] += count
        saving = sum(count for moment, count in outcome.moments.items() if moment.endswith("/save"))
        words = ", ".join(f"{entry} {count}" for entry, count in entries.most_common())
        lines.append(
            f"| {engine} | {ranks} | {outcome.kills} | {outcome.polite} | {saving} | {outcome.runs} |"
            f" {outcome.states_checked} | {outcome.longest_end_seconds:.1f} | {words} |"
        )
    return "\n".join(lines)


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    out = Path(sys.argv[1])
    for word in sys.argv[2:]:
        name, size, kills, *seconds = word.split(":")
        limit = float(seconds[0]) if seconds else math.inf
        # Ranks come out of a process that has one engine's library only; each engine has its own.
        process = multiprocessing.get_context("spawn").Process(
            target=run_configuration, args=(out, name, int(size), int(kills), limit)
        )
        process.start()
        process.join()
        if process.exitcode:
            return 1
    print(table(rows_of(out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
