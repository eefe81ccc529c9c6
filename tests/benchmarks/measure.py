"""Interleaved timing and peak memory of CUDA work, for the benchmarks of this folder."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch


def interleaved(cases: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, dict[str, float]]:
    """Return median, min and max milliseconds of each case, all cases once a round."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(warmup + rounds):
        for name, run in cases.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            if index >= warmup:
                times[name].append(start.elapsed_time(end))
    return {n: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t)} for n, t in times.items()}


def peak_extra_gib(run: Callable[[], object]) -> float:
    """Return by how much the allocator's peak rises while `run` runs, in GiB."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def write(path: Path, record: dict[str, object]) -> None:
    """Append one JSON line, at once: a later failure must not lose it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)
