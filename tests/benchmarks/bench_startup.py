"""Seconds from the start of Python to the end of the first optimizer step of the 12B, and which kernels were compiled.

    TRITON_CACHE_DIR=EMPTY_FOLDER python -m tests.benchmarks.bench_startup OUT.jsonl [--draw] [--steps 3] [--no-rehearsal]

With an empty folder and a fresh machine that is a cold start; run again with the same folder it is a warm one. FP8 blockwise,
8-bit states, 8,192 random tokens. --draw draws the weights as a run does; otherwise they are random values made on the GPU.
"""

import argparse
import os
from pathlib import Path

import torch
import triton

from nanotrain.config.training import TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.engines.torch_engine import TorchEngine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import HybridModel
from tests.benchmarks.bench_memory_12b import FP8, INT8, published_12b, random_weights
from tests.benchmarks.measure import write


def seconds_since_start() -> float:
    """Return the age of this process, in steps of 10 ms."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--no-rehearsal", action="store_true", help="compile kernels as the first step meets them")
    arguments = parser.parse_args()
    marks = {"imports": seconds_since_start()}
    compiled: list[tuple[float, str]] = []

    def mark(name: str) -> None:
        torch.cuda.synchronize()
        marks[name] = seconds_since_start() - sum(marks.values())

    def listen(*, src, metadata, metadata_group, times, cache_hit) -> None:
        if not cache_hit:
            compiled.append((times.total / 1e6, src.name))

    triton.knobs.compilation.listener = listen
    config = published_12b()
    training = TrainingConfig(
        steps=9, global_batch_size=1, micro_batch_size=1, sequence_length=8192, learning_rate=1e-5, optimizer=INT8
    )
    torch.zeros(1, device="cuda")
    mark("CUDA")
    with torch.device("meta"):
        model = HybridModel(config)
    engine = build_engine(FP8, model, training)
    assert isinstance(engine, TorchEngine)
    mark("engine, with the import of kernel libraries")
    engine.init_weights(1) if arguments.draw else random_weights(model)
    mark("weights")
    engine._rehearsed = arguments.no_rehearsal
    for step in range(arguments.steps):
        ids = torch.randint(0, config.vocab_size, (1, 8193))
        engine.train_step([MicroBatch(ids[:, :-1], ids[:, 1:].contiguous())], CrossEntropy(), 1e-5)
        mark(f"step {step + 1}")
    compiled.sort(reverse=True)
    write(arguments.out, {
        "seconds": {name: round(value, 2) for name, value in marks.items()}, "rehearsal": not arguments.no_rehearsal,
        "kernels compiled": len(compiled), "their seconds, one after the other": round(sum(s for s, _ in compiled), 1),
        "longest": [f"{name} {seconds:.2f}" for seconds, name in compiled[:12]],
    })  # fmt: skip


if __name__ == "__main__":
    main()
