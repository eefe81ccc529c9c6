"""The ranks of `agree`: the reference on the first of them, then the cases on all."""

import argparse
import json
import sys
from typing import Any

import torch

from nanotrain.config.engine import EngineConfig, EngineKind, Precision
from nanotrain.engines import build_engine
from nanotrain.engines.base import Engine
from nanotrain.engines.torch_engine import TorchEngine
from nanotrain.model.hybrid import build_meta_model
from nanotrain.runtime.distributed import current_world, from_all, on_first
from nanotrain.runtime.files import write_json_atomic
from tests.multi_gpu.agree import NUM_STEPS, PART, Case, all_cases
from tests.multi_gpu.results import Results
from tests.multi_gpu.shapes import CPU, GPU, SEED, Shape
from tests.multi_gpu.starts import Journal, attempts, leave, main
from tests.multi_gpu.training import (
    Clock,
    Numbers,
    connect,
    free_memory,
    judge,
    prepare_megatron,
    stop_megatron,
    train,
)


def references(shape: Shape, kinds: set[tuple[Precision, bool]]) -> dict[str, Numbers]:
    """Train the torch engine in this one process; it uses no group of the ranks."""
    found = {}
    for precision, packed in sorted(kinds):
        case = Case(shape.engine(precision), packed)
        engine = TorchEngine(case.engine, build_meta_model(shape.model), shape.training())
        engine.init_weights(SEED)
        found[case.reference] = train(engine, shape, range(NUM_STEPS), packed=packed)
        del engine
        free_memory()
    return found


class OnRanks:
    """Runs cases on this rank; Megatron's groups are kept between cases of one layout."""

    def __init__(self, shape: Shape, cases: dict[str, Case], expected: dict[str, Numbers]) -> None:
        self._shape, self._cases, self._expected = shape, cases, expected
        self._layout: object = None

    def __call__(self, name: str) -> dict[str, Any]:
        case = self._cases[name]
        try:
            return self._compare(case)
        finally:
            free_memory()

    def _compare(self, case: Case) -> dict[str, Any]:
        clock = Clock()
        engine = self._build(case.engine)
        build_seconds = clock.seconds
        found = train(engine, self._shape, range(NUM_STEPS), packed=case.packed)
        row = judge(found, self._expected[case.reference], case.engine.precision)
        row["same_on_all_ranks"] = all(numbers == found for numbers in from_all(found))
        row["passed"] = row["passed"] and row["same_on_all_ranks"]
        on_gpu = engine.device.type == "cuda"
        return {
            "ranks": current_world().size,
            "precision": case.engine.precision.value,
            "rows": "packed" if case.packed else "one document",
            **row,
            "build_seconds": build_seconds,
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        }

    def _build(self, config: EngineConfig) -> Engine:
        is_megatron = config.kind is EngineKind.megatron
        layout = (config.megatron.tensor_parallel, config.megatron.pipeline_parallel, config.megatron.context_parallel)
        if is_megatron:
            prepare_megatron(self._shape.device)
        if is_megatron and layout != self._layout:
            stop_megatron()
            self._layout = layout
        if self._shape is GPU:
            torch.cuda.reset_peak_memory_stats()
        engine = build_engine(config, build_meta_model(self._shape.model), self._shape.training())
        engine.init_weights(SEED)
        return engine


def on_ranks(options: argparse.Namespace) -> int:
    """Go through the cases on one of the ranks."""
    shape = CPU if options.cpu else GPU
    world = connect(shape)
    results, journal = Results(options.out), Journal(options.journal)
    cases, _ = all_cases(shape, world.size)
    names = options.cases.split(",")
    kinds = {(cases[name].engine.precision, cases[name].packed) for name in names}
    file = options.journal / "reference.json"

    def make() -> None:
        clock, gpu = Clock(), shape is GPU
        machine = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if gpu else "cpu"}
        found = references(shape, kinds)
        write_json_atomic(file, found)
        for name, numbers in found.items():
            losses, norms = [a for a, _ in numbers], [n for _, n in numbers]
            numbers = {"losses": losses, "gradient_norms": norms}
            results.row(PART, f"reference {name}", ranks=1, **numbers, **machine, seconds=clock.seconds)

    if not on_first(file.exists):  # a second start reads what the first one found
        on_first(make)
    expected = json.loads(file.read_text(encoding="utf-8"))
    for _ in attempts(PART, names, results, journal, OnRanks(shape, cases, expected)):
        pass
    return leave()


if __name__ == "__main__":
    sys.exit(main(on_ranks))
