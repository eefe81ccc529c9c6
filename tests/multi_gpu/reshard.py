"""States that move between layouts and numbers of ranks, and what a save costs; what the ranks of `faults` run.

A case that saves leaves its state and its numbers in the journal's folder, where the cases that load find them, also on
another number of ranks.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nanotrain.config.engine import EngineConfig, EngineKind, Precision
from nanotrain.engines import build_engine
from nanotrain.engines.base import Engine
from nanotrain.model.hybrid import build_meta_model
from nanotrain.runtime.distributed import current_world, from_all, wait_for_all
from nanotrain.runtime.files import write_json_atomic
from tests.multi_gpu.moves import PART, STALL, cases_of, fewer_ranks
from tests.multi_gpu.results import Results
from tests.multi_gpu.save_stall import measure_saves
from tests.multi_gpu.shapes import CPU, GPU, SEED, Shape
from tests.multi_gpu.starts import Journal, attempts, leave, main
from tests.multi_gpu.training import connect, free_memory, judge, prepare_megatron, stop_megatron, train

SAVED_AFTER, NUM_STEPS = 3, 6


class OnRanks:
    """Runs cases on this rank."""

    def __init__(self, shape: Shape, folder: Path, cases: dict[str, EngineConfig]) -> None:
        self._shape, self._folder, self._cases = shape, folder, cases

    def __call__(self, name: str) -> dict[str, Any]:
        config = self._cases[name]
        try:
            if name == STALL:
                return measure_saves(self._shape, config)
            kind, verb = name.split(": ")
            engine = self._build(config)
            saved = self._folder / kind.replace(" ", "-")
            row = self._save(engine, saved) if verb.startswith("saves") else self._load(engine, saved, config.precision)
            return {"ranks": current_world().size, "precision": config.precision.value, **row}
        finally:
            free_memory()

    def _build(self, config: EngineConfig) -> Engine:
        if config.kind is EngineKind.megatron:
            prepare_megatron(self._shape.device)
            stop_megatron()
        return build_engine(config, build_meta_model(self._shape.model), self._shape.training())

    def _save(self, engine: Engine, saved: Path) -> dict[str, Any]:
        """Train, save, and train on."""
        engine.init_weights(SEED)
        train(engine, self._shape, range(SAVED_AFTER), packed=True)
        if current_world().is_first:
            (saved / "state").mkdir(parents=True)
        wait_for_all()
        engine.save_state(saved / "state")
        wait_for_all()
        numbers = train(engine, self._shape, range(SAVED_AFTER, NUM_STEPS), packed=True)
        if current_world().is_first:
            write_json_atomic(saved / "numbers.json", numbers)
        losses, norms = [loss for loss, _ in numbers], [norm for _, norm in numbers]
        return {"losses": losses, "gradient_norms": norms, "passed": True}

    def _load(self, engine: Engine, saved: Path, precision: Precision) -> dict[str, Any]:
        """Load what was saved and train the steps after it; weights drawn from another seed are there before."""
        expected = json.loads((saved / "numbers.json").read_text(encoding="utf-8"))
        engine.init_weights(SEED + 1)
        engine.load_state(saved / "state")
        numbers = train(engine, self._shape, range(SAVED_AFTER, NUM_STEPS), packed=True)
        row = judge(numbers, [(loss, norm) for loss, norm in expected], precision)
        same = all(found == numbers for found in from_all(numbers))
        identical = [list(pair) for pair in numbers] == expected
        return {**row, "identical": identical, "same_on_all_ranks": same, "passed": row["passed"] and same}


def on_ranks(options: argparse.Namespace) -> int:
    """Go through the cases on one of the ranks; one rank alone is not connected to anything."""
    shape = CPU if options.cpu else GPU
    world = connect(shape)
    cases = cases_of(shape, world.size) | fewer_ranks(shape, world.size)
    run = OnRanks(shape, options.journal, cases)
    for _ in attempts(PART, options.cases.split(","), Results(options.out), Journal(options.journal), run):
        pass
    return leave()


if __name__ == "__main__":
    sys.exit(main(on_ranks))
