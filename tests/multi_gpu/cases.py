"""Runs the cases of a part one after the other, in one start of the ranks, so that none takes the rest with it.

What began and ended stands in FILE.progress.jsonl. A rank that fails (out of memory, a collective that waits too long) ends;
torchrun then starts all ranks again (launch/test_multi_gpu.sh allows it), which report the case as failed and go on with the next.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import Enum
from pathlib import Path
from traceback import print_exception
from types import TracebackType
from typing import NamedTuple

import torch

from nanotrain.config.engine import Device, EngineConfig, EngineKind
from nanotrain.config.errors import UserError
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.engines.base import Engine
from nanotrain.model.hybrid import build_meta_model
from nanotrain.runtime.distributed import current_world, from_all, from_first, start_ranks, stop_ranks
from tests.multi_gpu.results import Results
from tests.multi_gpu.trials import Trial
from tests.multi_gpu.weights import draw

COLLECTIVE_TIMEOUT = timedelta(seconds=90)
"""Longer than ranks compile kernels apart from each other; a rank that waits so long ends."""
LEAST_SECONDS = 15
"""A case does not begin with less of the part's time left."""
SMALLER = 0.85
"""Of the memory, for a second try at a case that the plan put too close to it."""
REHEARSAL_BYTES = 3_600_000
"""Of a pretended GPU on CPU ranks, so that depths are reduced there too."""


class Case(NamedTuple):
    """A name in the rows, and what measures it and writes them."""

    name: str
    run: Callable[["Bench"], None]


class Bench:
    """The ranks of a part, their memory, and where rows go."""

    def __init__(self, part: str, options: argparse.Namespace) -> None:
        self.part, self.cpu, self.out = part, options.cpu, options.out
        self.ranks, self.is_first = current_world().size, current_world().is_first
        self.device = Device.cpu if self.cpu else Device.cuda
        self._results = Results(self.out)
        self.memory_share = 1.0
        self.warmup, self.rounds = (0, 1) if self.cpu else (1, 5)
        self.card = "CPU" if self.cpu else torch.cuda.get_device_name()

    def row(self, name: str, **values: object) -> None:
        """Write a row of this part."""
        self._results.row(self.part, name, **({"ranks": self.ranks, "card": self.card} | values))

    def free_bytes(self) -> int:
        """Return what the fullest GPU has left for a case; less of it where the case ran out of memory before."""
        self.free()
        free = REHEARSAL_BYTES if self.cpu else torch.cuda.mem_get_info()[0]
        return int(self.memory_share * min(from_all(free)))

    def free(self) -> None:
        """Give back what the last case held, and count peaks anew."""
        gc.collect()
        if not self.cpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        """Wait for this rank's GPU."""
        if not self.cpu:
            torch.cuda.synchronize()

    def lasting_bytes(self) -> int:
        """Return what is allocated now, and count peaks anew."""
        self.wait()
        self.free()
        return 0 if self.cpu else torch.cuda.memory_allocated()

    def peak_bytes(self) -> list[int]:
        """Return each rank's peak of allocated bytes; zeros on CPU ranks."""
        return from_all(0 if self.cpu else torch.cuda.max_memory_allocated())

    def engine(self, trial: Trial) -> Engine:
        """Return a trial's engine with random weights."""
        if trial.engine.kind is EngineKind.megatron:
            self.start_groups(trial.engine.megatron)
        return self.build(trial.engine, trial, trial.training)

    def build(self, config: EngineConfig, trial: Trial, training: TrainingConfig | None) -> Engine:
        """Return an engine; Megatron's groups exist."""
        engine = build_engine(config, build_meta_model(trial.model), training)
        draw(engine)
        return engine

    def start_groups(self, megatron: MegatronConfig) -> None:
        """Make Megatron's groups for a layout, with this part's timeout (its own is half an hour)."""
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if self.ranks == 1:
            return  # the engine makes the group of one process
        parallel_state.initialize_model_parallel(
            megatron.tensor_parallel,
            megatron.pipeline_parallel,
            context_parallel_size=megatron.context_parallel,
            distributed_timeout_minutes=COLLECTIVE_TIMEOUT.total_seconds() / 60,  # type: ignore[arg-type]  # of a timedelta
        )
        model_parallel_cuda_manual_seed(1)


class _Progress:
    """What began and ended, and why a case failed; a line each, any rank's."""

    def __init__(self, out: Path) -> None:
        self._path = out.with_suffix(".progress.jsonl")
        self._is_first = current_world().is_first

    def begin(self, restarted: bool) -> list[dict[str, object]]:
        """Return the lines of earlier starts, the same on every rank; the first line holds the time of the first start."""
        if self._is_first and not restarted:
            self._path.unlink(missing_ok=True)
            self.note(began=time.time())
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._is_first else []
        return from_first([json.loads(line) for line in lines])

    def note(self, **values: object) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


class _Noted:
    """The context of a case: notes how it ended. Ranks that refuse it alike, by a sentence, go on; anything else ends them."""

    def __init__(self, progress: _Progress, name: str, first: bool) -> None:
        self._progress, self._name, self._first = progress, name, first
        self.refused: str | None = None

    def __enter__(self) -> "_Noted":
        if self._first:
            self._progress.note(started=self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is None:
            return False
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:400]
        # Ranks that ran out of memory may have left a collective at different places.
        if isinstance(error, UserError) and not isinstance(error.__cause__, torch.OutOfMemoryError):
            self.refused = reason
            return True
        self._progress.note(failed=self._name, rank=current_world().rank, reason=reason)
        # At once: NCCL may wait for the other ranks while Python takes the process down in order.
        print_exception(error)
        sys.stderr.flush()
        os._exit(1)


class _Again(Enum):
    first = "not begun yet"
    smaller = "ran out of memory once"


def _report_failure(bench: Bench, name: str, earlier: list[dict[str, object]]) -> "_Again | None":
    """Write how a case of an earlier start failed; return whether it is to run now."""
    starts = sum(line.get("started") == name for line in earlier)
    if not starts:
        return _Again.first
    last = max(index for index, line in enumerate(earlier) if line.get("started") == name)
    reasons = [str(line["reason"]) for line in earlier[last:] if line.get("failed") == name]
    # The ranks after the first one that failed lost their connection to it.
    bench.row(name, failed=reasons[0] if reasons else "a rank ended without a word")
    out_of_memory = any("memory" in reason for reason in reasons)
    return _Again.smaller if out_of_memory and starts == 1 else None


def _run_case(bench: Bench, name: str, run: Callable[[Bench], None], progress: _Progress) -> None:
    with _Noted(progress, name, bench.is_first) as noted:
        run(bench)
    refusals = [reason for reason in from_all(noted.refused) if reason is not None]
    if refusals:
        bench.row(name, failed=refusals[0])


def options_of(budget_seconds: float) -> argparse.Namespace:
    """Read a part's command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--cpu", action="store_true", help="rehearse with tiny shapes on CPU ranks")
    parser.add_argument("--budget", type=float, default=budget_seconds, help="seconds after which no case begins")
    return parser.parse_args()


def run_part(part: str, cases: Callable[[Bench], Sequence[Case]], options: argparse.Namespace) -> None:
    """Connect the ranks, run what is left to run, and print a table.

    Args:
        part: name in the rows.
        cases: returns them, the most important first.
        options: of `options_of`.
    """
    start_ranks(COLLECTIVE_TIMEOUT)
    if options.cpu:
        from tests import megatron_cpu

        megatron_cpu.install()
    bench = Bench(part, options)
    progress = _Progress(options.out)
    earlier = progress.begin(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)
    ended = {line["ended"] for line in earlier if "ended" in line}
    for name, run in cases(bench):
        if name in ended:
            continue
        seconds = from_first(time.time()) - float(earlier[0]["began"])  # type: ignore[arg-type]
        late = None
        if seconds > options.budget - LEAST_SECONDS:
            late = f"the part's {options.budget:g} seconds are over"
        again = _report_failure(bench, name, earlier)
        if again and late is None:
            bench.memory_share = 1.0 if again is _Again.first else SMALLER
            _run_case(bench, name, run, progress)
        elif again is _Again.first:
            bench.row(name, not_run=late)
        if bench.is_first:
            progress.note(ended=name)
        bench.free()
    if bench.is_first:
        print(table(part, options.out), flush=True)
    stop_ranks()


COLUMNS = ("name", "layers", "ms", "tokens_per_second_per_gpu", "mfu", "peak_gib", "plan_ms_error", "plan_gib_error")


def table(part: str, file: Path) -> str:
    """Return a part's rows as text, a column each of what most of them have; a failure in place of the numbers."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = ["  ".join((COLUMNS[0].ljust(34), *(column.rjust(14)[-14:] for column in COLUMNS[1:])))]
    for row in (row for row in rows if row["part"] == part):
        failure = row.get("failed") or row.get("not_run")
        cells = [failure] if failure else [_cell(row.get(column)).rjust(14) for column in COLUMNS[1:]]
        lines.append("  ".join((row["name"].ljust(34), *cells)))
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, list):
        value = max(value)
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
