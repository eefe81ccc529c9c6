"""Throughput of the 12B in sequences of 8,192 tokens, beside a bare Megatron-Core loop, and weak scaling from one GPU.

All in FP8 blockwise. A comparison holds both models at once, so it has fewer layers. Weak scaling gives each GPU the work that
one GPU did alone.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from nanotrain.config.engine import EngineConfig
from nanotrain.config.errors import UserError
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ModelConfig
from nanotrain.planning.layout import data_parallel_size, fp8_layers
from nanotrain.planning.pipeline_stages import padded_vocab_size
from nanotrain.runtime.distributed import from_first
from tests.benchmarks.measure import ratios, rotating
from tests.multi_gpu.cases import Bench, Case, options_of, run_part
from tests.multi_gpu.steps import Training, time_training, times_of
from tests.multi_gpu.trials import (
    LEARNING_RATE,
    Trial,
    architecture,
    deepest,
    described,
    megatron_engine,
    torch_engine,
    training_of,
)

PART, BUDGET_SECONDS, ALONE_SECONDS = "speed", 220, 130
LENGTH, TINY_LENGTH = 8192, 64
MICRO_BATCHES = 2
"""Of a data-parallel rank under Megatron; the torch engine takes one, because FSDP2 keeps whole gradients between several."""
BYTES_A_LOGIT = 10
"""Of the bare loop's loss, which has all logits: 10.7 GiB for 8,192 x 131,072 (docs/benchmarks/memory_h200_202611.md)."""
ALONE_MEGATRON, ALONE_TORCH = "weak_distributed_optimizer_1", "weak_fsdp2_1"


def length_of(bench: Bench) -> int:
    """Return the tokens of a sequence."""
    return TINY_LENGTH if bench.cpu else LENGTH


def layouts(ranks: int) -> dict[str, MegatronConfig]:
    """Return all ranks tensor-parallel, and two with the rest data-parallel, by name."""
    found = {}
    for tensor in sorted({ranks, 2}, reverse=True):
        found[f"tp{tensor}_dp{ranks // tensor}"] = MegatronConfig(tensor_parallel=tensor, sequence_parallel=True)
    return found


def megatron_trial(bench: Bench, layout: MegatronConfig, model: ModelConfig) -> Trial:
    """Return a trial of two micro-batches a data-parallel rank."""
    batch = MICRO_BATCHES * data_parallel_size(layout, bench.ranks)
    engine = megatron_engine(bench.device, layout)
    return Trial(model, training_of(batch, length_of(bench)), engine, bench.ranks)


def run_megatron(name: str, layout: MegatronConfig, bench: Bench) -> None:
    """Time the 12B, as deep as it fits."""
    full = architecture("12b", cpu=bench.cpu)
    trial = deepest(megatron_trial(bench, layout, full), bench.free_bytes())
    time_training(bench, name, trial, full)


def run_beside_bare(name: str, layout: MegatronConfig, bench: Bench) -> None:
    """Time a step of our loop and one of the bare loop in turn; both models are there at once."""
    from tests.benchmarks import megatron_peer

    full = architecture("12b", cpu=bench.cpu)
    rows = padded_vocab_size(full.vocab_size, layout.tensor_parallel) // layout.tensor_parallel
    logits = length_of(bench) * rows * BYTES_A_LOGIT
    trial = deepest(
        megatron_trial(bench, layout, full), bench.free_bytes(), lambda tried: 2 * tried.planned_bytes() + logits
    )
    ours = Training(trial, bench.engine(trial))
    in_fp8 = len(fp8_layers(trial.model, trial.engine)) > 0
    model = megatron_peer.build(
        trial.model,
        trial.engine.precision.value,
        trial.engine.fp8_bf16_first_layers if in_fp8 else 0,
        length_of(bench),
        fp8_parameters=in_fp8,
        layout=layout,
    )
    bare = megatron_peer.training_loop_of(model, ours.batches, LEARNING_RATE)
    times = rotating({"nanotrain": ours, "bare": bare}, bench.rounds, bench.wait, 2 * bench.warmup)
    bare_loss, bare_norm = bare()
    told = {"nanotrain": ours.told(), "bare": {"loss": bare_loss, "grad_norm": bare_norm}}
    for loop, seconds in times.items():
        bench.row(
            f"{name} {loop}",
            **described(trial, full),
            **times_of(bench, trial, seconds),
            **ratios(times["bare"], seconds),
            **told[loop],
        )


def run_fsdp2(name: str, bench: Bench) -> None:
    """Time the 12B under FSDP2, with activation checkpointing where it needs it."""
    full = architecture("12b", cpu=bench.cpu)
    free = bench.free_bytes()
    training = training_of(bench.ranks, length_of(bench))
    for checkpointed in (False, True):
        engine = torch_engine(bench.device, divided=True, checkpointed=checkpointed)
        trial = deepest(Trial(full, training, engine, bench.ranks), free)
        if trial.model == full:
            break
    time_training(bench, name, trial, full, activation_checkpointing=checkpointed)


def alone(bench: Bench) -> Sequence[Case]:
    """Return the cases of one GPU that weak scaling starts from."""
    full = architecture("12b", cpu=bench.cpu)

    def measure(name: str, engine: EngineConfig, batch: int, bench: Bench) -> None:
        trial = deepest(Trial(full, training_of(batch, length_of(bench)), engine, 1), bench.free_bytes())
        time_training(bench, name, trial, full, profiled=True)

    # The torch engine first: it compiles its kernels on all cores at once, for the ranks too.
    return [
        Case(ALONE_TORCH, partial(measure, ALONE_TORCH, torch_engine(bench.device, divided=False), 1)),
        Case(
            ALONE_MEGATRON,
            partial(measure, ALONE_MEGATRON, megatron_engine(bench.device, MegatronConfig()), MICRO_BATCHES),
        ),
    ]


def run_alone(bench: Bench) -> None:
    """Measure one GPU in a process of its own, while the ranks wait with nothing on theirs."""
    file = alone_file(bench)
    problem = start_alone(file, cpu=bench.cpu) if bench.is_first else None
    for row in from_first(rows_of(file)):
        bench.row(row.pop("name"), **{key: value for key, value in row.items() if key != "part"})
    problem = from_first(problem)
    if problem is not None:
        raise UserError(problem)


def start_alone(file: Path, *, cpu: bool) -> str | None:
    """Run alone.py, again where a case ended it; return why it did not come to its end."""
    file.unlink(missing_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not is_launchers(name)}
    command = [sys.executable, "-m", "tests.multi_gpu.alone", "--out", str(file), *(["--cpu"] if cpu else [])]
    end = time.monotonic() + ALONE_SECONDS
    for restart in range(4):
        try:
            environment = inherited | {"TORCHELASTIC_RESTART_COUNT": str(restart)}
            done = subprocess.run(command, env=environment, timeout=max(end - time.monotonic(), 1), check=False)
        except subprocess.TimeoutExpired:
            return f"the process of one GPU was not done in {ALONE_SECONDS} seconds"
        if done.returncode == 0:
            return None
    return f"the process of one GPU ended with code {done.returncode}"


def is_launchers(name: str) -> bool:
    """Return whether torchrun set this variable for a rank."""
    exact = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return name in exact or name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))


def alone_file(bench: Bench) -> Path:
    """Return where the process of one GPU writes its rows."""
    return bench.out.with_suffix(".alone.jsonl")


def rows_of(file: Path) -> list[dict]:
    """Return a file's rows; none where it is not there."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def run_weak(name: str, base: str, engine: EngineConfig, each: int, bench: Bench) -> None:
    """Time the model of a case of one GPU with as much work for each of all GPUs.

    Args:
        name: of the row.
        base: the case of one GPU.
        engine: data-parallel over all ranks.
        each: micro-batches of a rank.
        bench: the ranks.
    """
    found = from_first([row for row in rows_of(alone_file(bench)) if row["name"] == base and "ms" in row])
    if not found:
        raise UserError(f"`{base}` was not measured, so {name} has nothing to be compared with; see its row.")
    full = architecture("12b", cpu=bench.cpu)
    model = replace(full, hybrid_layer_pattern=full.hybrid_layer_pattern[: found[0]["layers"]])
    trial = Trial(model, training_of(each * bench.ranks, length_of(bench)), engine, bench.ranks)
    time_training(bench, name, trial, full, one_gpu=found[0]["tokens_per_second_per_gpu"], profiled=True)


def cases(bench: Bench) -> Sequence[Case]:
    """Return the cases, the most important first; the ones of one GPU before anything has memory on the first."""
    ranks = bench.ranks
    megatron = [
        [
            Case(name, partial(run_megatron, name, layout)),
            Case(f"{name}_beside_bare", partial(run_beside_bare, f"{name}_beside_bare", layout)),
        ]
        for name, layout in layouts(ranks).items()
    ]
    fsdp2, weak, weak_fsdp2 = f"fsdp2_{ranks}", f"weak_distributed_optimizer_{ranks}", f"weak_fsdp2_{ranks}"
    plain, divided = megatron_engine(bench.device, MegatronConfig()), torch_engine(bench.device, divided=True)
    return [
        Case("alone", run_alone),
        *megatron[0],
        Case(fsdp2, partial(run_fsdp2, fsdp2)),
        Case(weak, partial(run_weak, weak, ALONE_MEGATRON, plain, MICRO_BATCHES)),
        Case(weak_fsdp2, partial(run_weak, weak_fsdp2, ALONE_TORCH, divided, 1)),
        *(case for cases in megatron[1:] for case in cases),
    ]


if __name__ == "__main__":
    run_part(PART, cases, options_of(BUDGET_SECONDS))
