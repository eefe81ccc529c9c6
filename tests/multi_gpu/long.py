"""One sequence of 131,072 tokens under context parallelism: forward, backward and update, layers recomputed or kept.

Memory is compared with the plan in two parts: what lasts between steps (weights, gradients, states), and what comes on top
within one. From both follows what the plan's formula for the published layout (TP 8 x CP 16, 524,288 tokens) would be off by,
were it off as much there as here.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from nanotrain.config.engine import Device
from nanotrain.config.megatron import MegatronConfig, Recompute
from nanotrain.planning.parallel_memory import RankMemory
from tests.benchmarks.measure import rotating
from tests.multi_gpu.cases import Bench, Case, options_of, run_part
from tests.multi_gpu.steps import Training, memory_of, times_of
from tests.multi_gpu.trials import (
    GIB,
    Trial,
    against_plan,
    architecture,
    deepest,
    described,
    megatron_engine,
    training_of,
)

PART, BUDGET_SECONDS = "long", 200
LENGTH, TINY_LENGTH = 131072, 256
ROUNDS = 2
PUBLISHED_RANKS, PUBLISHED_BATCH, PUBLISHED_LENGTH = 128, 12, 524288
PUBLISHED = MegatronConfig(tensor_parallel=8, sequence_parallel=True, context_parallel=16)


def layouts(ranks: int) -> dict[str, MegatronConfig]:
    """Return all ranks context-parallel, the same with all activations kept (fewer layers fit), two of them tensor-parallel,
    and fewer context-parallel with data parallel."""
    found = {
        f"cp{ranks}": MegatronConfig(context_parallel=ranks, recompute=Recompute.full),
        f"cp{ranks}_kept": MegatronConfig(context_parallel=ranks),
    }
    if ranks > 2:
        found[f"tp2_cp{ranks // 2}"] = MegatronConfig(
            tensor_parallel=2, sequence_parallel=True, context_parallel=ranks // 2, recompute=Recompute.full
        )
    for context in (4, 2):
        if context < ranks:
            found[f"cp{context}_dp{ranks // context}"] = MegatronConfig(
                context_parallel=context, recompute=Recompute.full
            )
    return found


def parts_of(memory: RankMemory) -> tuple[int, int]:
    """Return the plan's bytes that last between steps, and those on top within one."""
    lasting = memory.weights + memory.gradients + memory.optimizer_states
    return lasting, memory.activations + memory.workspace


def published_parts(recompute: Recompute) -> tuple[int, int]:
    """Return both for a rank of the published layout, which does not say whether layers were recomputed."""
    training = training_of(PUBLISHED_BATCH, PUBLISHED_LENGTH)
    engine = megatron_engine(Device.cuda, replace(PUBLISHED, recompute=recompute))
    return parts_of(Trial(architecture("12b", cpu=False), training, engine, PUBLISHED_RANKS).rank_memory())


def run_long(name: str, layout: MegatronConfig, bench: Bench) -> None:
    """Time the 12B, as deep as it fits, on one sequence for each data-parallel rank."""
    full = architecture("12b", cpu=bench.cpu)
    batch = bench.ranks // (layout.tensor_parallel * layout.context_parallel)
    training_config = training_of(batch, TINY_LENGTH if bench.cpu else LENGTH)
    trial = deepest(
        Trial(full, training_config, megatron_engine(bench.device, layout), bench.ranks), bench.free_bytes()
    )
    training = Training(trial, bench.engine(trial))
    training()
    lasting = bench.lasting_bytes()
    seconds = rotating({name: training}, ROUNDS, bench.wait, warmup=0)[name]
    peak = max(bench.peak_bytes())
    planned = parts_of(trial.rank_memory())
    measured = {"lasting": lasting, "passing": peak - lasting}
    row: dict[str, object] = {}
    scaled = 0.0
    published = published_parts(layout.recompute)
    for part, of_plan, of_published in zip(measured, planned, published, strict=True):
        row[f"{part}_gib"] = measured[part] / GIB
        row |= against_plan(measured[part] / GIB, of_plan / GIB, f"{part}_gib")
        scaled += of_published * measured[part] / of_plan
    row["published_plan_gib"] = sum(published) / GIB
    row["published_scaled_gib"] = scaled / GIB
    row["published_plan_error"] = sum(published) / scaled - 1 if scaled else None
    bench.row(
        name,
        **described(trial, full),
        recompute=layout.recompute.value,
        **times_of(bench, trial, seconds),
        **memory_of(bench, trial.planned_bytes()),
        **row,
        **training.told(),
    )


def cases(bench: Bench) -> Sequence[Case]:
    """Return a case a layout."""
    return [Case(name, partial(run_long, name, layout)) for name, layout in layouts(bench.ranks).items()]


if __name__ == "__main__":
    run_part(PART, cases, options_of(BUDGET_SECONDS))
