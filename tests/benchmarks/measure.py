"""Interleaved timing and peak memory, for benchmarks."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanotrain.engines.torch_engine import TorchEngine


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


def rotating(
    steps: dict[str, Callable[[], object]], rounds: int, wait: Callable[[], None], warmup: int = 2
) -> dict[str, list[float]]:
    """Return the seconds of each step's calls by the host's clock, all steps once a round and each round in another order.

    Args:
        steps: by name.
        rounds: that are timed.
        wait: returns when the device has done its work.
        warmup: rounds before them.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for round_ in range(warmup + rounds):
        order = [*order[1:], order[0]]
        for name in order:
            wait()
            start = time.perf_counter()
            steps[name]()
            wait()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def spread(seconds: list[float]) -> dict[str, float]:
    """Return median, least and most in milliseconds."""
    return {"ms": 1e3 * statistics.median(seconds), "min_ms": 1e3 * min(seconds), "max_ms": 1e3 * max(seconds)}


def ratios(over: list[float], seconds: list[float]) -> dict[str, float]:
    """Return how many times as fast as `over` the calls were: median, least and most of the rounds."""
    found = [theirs / mine for theirs, mine in zip(over, seconds, strict=True)]
    return {"speed_over_bare": statistics.median(found), "ratio_min": min(found), "ratio_max": max(found)}


def peak_extra_gib(run: Callable[[], object]) -> float:
    """Return by how much the allocator's peak rises while `run` runs, in GiB."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def state_tensors(engine: TorchEngine) -> dict[str, Tensor]:
    """Return the weights and optimizer states of an engine by name."""
    found = {}
    for name, parameter in engine._model.named_parameters():
        found[name] = parameter.detach()
        for field, value in engine._optimizer.state[parameter].items():  # type: ignore[union-attr]
            found[f"{name}/{field}"] = value
    return found


def write(path: Path, record: dict[str, object]) -> None:
    """Append one JSON line, at once: a later failure must not lose it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)
