"""The Megatron engine at the 12B's layer shapes on one GPU: agreement, throughput beside a bare Megatron-Core loop, long context.

    python -m tests.benchmarks.bench_megatron steps:bf16 steps:fp8_blockwise long --out results.jsonl

`steps:PRECISION` trains the torch engine and the Megatron engine from the same weights on the same batches, then times our
loop and the bare loop (Megatron's own model, loss, schedule and optimizer), a step each in turn. `long` is forward, backward
and update on one sequence of 131,072 tokens. Every part is written as soon as it is done. `--tiny` checks the script on the CPU.
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from nanotrain.config.engine import Device, EngineConfig, EngineKind, Precision
from nanotrain.config.megatron import MegatronConfig, Recompute
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.engines.base import Engine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import build_meta_model
from tests.benchmarks.measure import ratios, rotating, spread

REDUCED = ModelConfig(
    hybrid_layer_pattern="M-M*-M-",
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=20480,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=80,
    ssm_state_size=128,
    n_groups=8,
)
TINY = replace(
    REDUCED, vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=16, n_groups=2,
)  # fmt: skip
NUM_MICRO, STEPS, LEARNING_RATE = 2, 3, 1e-4


class Bench:
    """The sizes of a run and where its numbers go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tiny, self.rounds, self.out = options.tiny, options.rounds, options.out
        self.model = TINY if self.tiny else REDUCED
        self.length = 64 if self.tiny else 8192
        self.long_length = 256 if self.tiny else 131072
        self.device = torch.device("cpu" if self.tiny else "cuda")

    def report(self, part: str, **values: object) -> None:
        line = json.dumps({"part": part, **values})
        print(line, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(line + "\n")

    def engine(self, precision: str, kind: str, length: int, num_micro: int, megatron: MegatronConfig) -> Engine:
        config = EngineConfig(
            kind=EngineKind(kind),
            device=Device.cpu if self.tiny else Device.cuda,
            precision=Precision.fp32 if self.tiny else Precision(precision),
            megatron=megatron,
        )
        training = TrainingConfig(
            steps=10, global_batch_size=num_micro, micro_batch_size=1, sequence_length=length,
            learning_rate=LEARNING_RATE,
        )  # fmt: skip
        engine = build_engine(config, build_meta_model(self.model), training)
        engine.init_weights(1)
        return engine

    def batches(self, step: int, length: int, num_micro: int) -> list[MicroBatch]:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, self.model.vocab_size, (num_micro, length + 1), generator=generator)
        return [MicroBatch(row[None, :-1].contiguous(), row[None, 1:].contiguous()) for row in ids]

    def free(self) -> None:
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        return 0.0 if self.tiny else torch.cuda.max_memory_allocated() / 2**30

    def wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()


def train(bench: Bench, engine: Engine) -> list[tuple[float, float]]:
    found = []
    for step in range(STEPS):
        result = engine.train_step(bench.batches(step, bench.length, NUM_MICRO), CrossEntropy(), LEARNING_RATE)
        found.append((result.loss, result.grad_norm))
    return found


def compare_steps(bench: Bench, precision: str) -> None:
    start = time.perf_counter()
    engine = bench.engine(precision, "torch", bench.length, NUM_MICRO, MegatronConfig())
    expected = train(bench, engine)
    bench.report(
        f"steps:{precision}",
        engine="torch",
        steps=expected,
        seconds=time.perf_counter() - start,
        peak_gib=bench.peak_gib(),
    )
    del engine
    bench.free()
    start = time.perf_counter()
    engine = bench.engine(precision, "megatron", bench.length, NUM_MICRO, MegatronConfig())
    found = train(bench, engine)
    worst = [max(abs(g[i] - e[i]) / e[i] for g, e in zip(found, expected, strict=True)) for i in range(2)]
    bench.report(
        f"steps:{precision}", engine="megatron", steps=found, relative_loss=worst[0], relative_grad_norm=worst[1],
        seconds=time.perf_counter() - start, peak_gib=bench.peak_gib(),
    )  # fmt: skip
    compare_throughput(bench, precision, engine)


def compare_throughput(bench: Bench, precision: str, engine: Engine) -> None:
    """Time a step of our loop and one of the bare loop in turn; the data lie where the loader leaves them, on the host."""
    batches = bench.batches(0, bench.length, NUM_MICRO)

    def ours() -> None:
        engine.train_step(batches, CrossEntropy(), LEARNING_RATE)

    steps = {"nanotrain": ours}
    if not bench.tiny:
        from tests.benchmarks import megatron_peer

        layers = 2 if precision.startswith("fp8") else 0
        model = megatron_peer.build(bench.model, precision, layers, bench.length, fp8_parameters=layers > 0)
        steps["bare"] = megatron_peer.training_loop_of(model, batches, LEARNING_RATE)
    times = rotating(steps, bench.rounds, bench.wait)
    tokens = NUM_MICRO * bench.length
    for name, values in times.items():
        over = times["bare"] if "bare" in times else values
        bench.report(
            f"throughput:{precision}", loop=name, **spread(values),
            tokens_per_second=tokens / statistics.median(values), **ratios(over, values),
        )  # fmt: skip


def long_context(bench: Bench, precision: str) -> None:
    """One sequence, all layers recomputed."""
    engine = bench.engine(precision, "megatron", bench.long_length, 1, MegatronConfig(recompute=Recompute.full))
    bench.free()
    seconds = []
    for step in range(3):
        bench.wait()
        start = time.perf_counter()
        result = engine.train_step(bench.batches(step, bench.long_length, 1), CrossEntropy(), LEARNING_RATE)
        bench.wait()
        seconds.append(time.perf_counter() - start)
    bench.report(
        f"long:{precision}", tokens=bench.long_length, layers=bench.model.hybrid_layer_pattern, seconds=seconds,
        loss=result.loss, grad_norm=result.grad_norm, peak_gib=bench.peak_gib(),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true")
    bench = Bench(parser.parse_args())
    if bench.tiny:
        from tests import megatron_cpu

        megatron_cpu.install()
    for part in parser.parse_args().parts:
        kind, _, precision = part.partition(":")
        {"steps": compare_steps, "long": long_context}[kind](bench, precision or "bf16")
        bench.free()


if __name__ == "__main__":
    main()
