"""Kills runs at random moments until they are through, and compares their ends with an undisturbed one's.

python -m tests.end_to_end.campaign OUT.jsonl SIZE:KILLS[:SECONDS] ...     the account of docs/benchmarks
"""

import json
import math
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanotrain.checkpoint.resume import find_defect
from tests.end_to_end.ranks_of_a_run import RECIPE, Ranks, digest_of_run, make_wheels, settings, warm_up

MAX_END_SECONDS = 60.0
"""All ranks must have ended so long after one was killed."""
MAX_ATTEMPTS = 400


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


class Campaign:
    """One recipe on one number of ranks."""

    def __init__(self, arguments: list[str], size: int, wheels: dict[str, Path], folder: Path, seed: int = 0) -> None:
        self._arguments, self._size, self._wheels, self._folder = arguments, size, wheels, folder
        self._chance = random.Random(f"{seed}-{size}")
        self.outcome = Outcome()
        warm_up()
        started = time.monotonic()
        self.expected = self._run_undisturbed()
        self._seconds = time.monotonic() - started

    def _start(self, output: Path) -> Ranks:
        return Ranks([*self._arguments, f"output_dir='{output}'"], self._size, self._wheels, self._folder / "logs")

    def _run_undisturbed(self) -> dict[str, Any]:
        output = self._folder / "calm"
        ranks = self._start(output)
        try:
            codes = ranks.wait(240)
            assert codes == [0] * self._size, (codes, ranks.output[-3000:])
        finally:
            ranks.kill()
        return digest_of_run(output)

    def run(self, kills: int, seconds: float = math.inf) -> Outcome:
        """Start runs and kill them until so many kills were made, or so long; the last run is brought to its end."""
        deadline = time.monotonic() + seconds
        while self.outcome.kills < kills and time.monotonic() < deadline:
            output = self._folder / f"stormy-{self.outcome.runs}"
            attempts = 0
            while not self._attempt(
                output, attempts, disturb=self.outcome.kills < kills and time.monotonic() < deadline
            ):
                attempts += 1
                assert attempts < MAX_ATTEMPTS, "the run makes no progress between kills"
            found = digest_of_run(output)
            assert found == self.expected, {
                key: (found[key], self.expected[key]) for key in found if found[key] != self.expected[key]
            }
            leftovers = [path for path in output.rglob(".*") if path.name != ".lock"]
            assert not leftovers, leftovers
            self.outcome.runs += 1
        return self.outcome

    def _attempt(self, output: Path, number: int, disturb: bool) -> bool:
        """Start the run once; return True when it came to its end."""
        ranks = self._start(output)
        try:
            # The patience grows, so that a loaded machine cannot starve the run.
            patience = self._seconds * self._chance.uniform(0.05, 0.6) * (1 + number / 10) if disturb else 240.0
            if self._ended_by_itself(ranks, patience):
                return True
            assert disturb, ("the run hangs", ranks.output[-3000:])
            self._kill(ranks, output)
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

    def _kill(self, ranks: Ranks, output: Path) -> None:
        outcome = self.outcome
        outcome.moments[_moment(output)] += 1
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
        assert codes is not None, ("a rank goes on without the others", ranks.output[-3000:])
        if polite:
            # A signal may reach a rank before its handlers are there, and some ranks when they are through already.
            allowed = {75, 0, -signal.SIGTERM, -signal.SIGUSR1}
            assert (
                set(codes) <= allowed or not output.exists() or {75, -signal.SIGTERM, -signal.SIGUSR1, 0} & set(codes)
            ), (
                codes,
                ranks.output[-3000:],
            )
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


def main() -> None:
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        wheels_folder = Path(folder) / "wheels"
        wheels_folder.mkdir()
        wheels = make_wheels(wheels_folder)
        for word in sys.argv[2:]:
            size, kills, seconds = ([float(part) for part in word.split(":")] + [math.inf])[:3]
            started = time.monotonic()
            work = Path(folder) / f"{int(size)}-ranks"
            campaign = Campaign(["run", RECIPE, *settings(8, 1e-6)], int(size), wheels, work)
            row = vars(campaign.run(int(kills), seconds)) | {"ranks": int(size), "seconds": time.monotonic() - started}
            print(row, flush=True)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
