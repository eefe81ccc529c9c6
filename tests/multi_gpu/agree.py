"""Every engine on N ranks against one process: losses and gradient norms of a few steps on the same global batches.

    bash launch/test_multi_gpu.sh agree

The reference is the torch engine in one process on the first rank's GPU; the ranks (agree_on_ranks.py) read its numbers. Then
torch DDP and FSDP2 and Megatron under every layout that N allows in bf16 and FP8 blockwise, and DeepSpeed in bf16.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nanotrain.config.engine import EngineConfig, EngineKind, Precision
from nanotrain.config.parallel import DataParallel, DeepSpeedConfig
from tests.multi_gpu.layouts import megatron_layouts
from tests.multi_gpu.results import Results
from tests.multi_gpu.shapes import CPU, GPU, Shape, patience
from tests.multi_gpu.starts import Journal, Limits, Ranks, arguments_of_ranks, chosen, main, run_cases, summary

PART = "agree"
NUM_STEPS = 5
LIMITS = Limits(total=260.0, case=100.0, first=120.0)


@dataclass(frozen=True)
class Case:
    """An engine in a precision, on packed rows or on rows of one document."""

    engine: EngineConfig
    packed: bool

    @property
    def reference(self) -> str:
        return f"{self.engine.precision.value} {'packed' if self.packed else 'plain'}"


def all_cases(shape: Shape, size: int) -> tuple[dict[str, Case], dict[str, str]]:
    """Return the cases by name, the most telling first, and the layouts left out with the reason."""
    layouts, left_out = megatron_layouts(size)
    cases: dict[str, Case] = {}

    def add(name: str, precision: Precision, packed: bool = True, **changes: object) -> None:
        cases[f"{name} {precision.value}"] = Case(shape.engine(precision, **changes), packed)

    for precision in shape.precisions:
        add("torch ddp", precision, data_parallel=DataParallel.ddp)
        add("torch fsdp2", precision, data_parallel=DataParallel.fsdp2)
    for name, layout in layouts.items():
        for precision in shape.precisions:
            if precision is not Precision.fp32 and not layout.distributed_optimizer:
                left_out[name] = f"refused in {precision.value}: its state could not be saved"
                continue
            add(f"megatron {name}", precision, kind=EngineKind.megatron, megatron=layout)
            # Rows of one document go through other kernels under context parallelism; data parallelism is beside it.
            if name in (f"cp{size}", f"dp{size}"):
                add(f"megatron {name} plain", precision, False, kind=EngineKind.megatron, megatron=layout)
    for stage in (1, 2, 3):
        add(f"deepspeed zero{stage}", shape.precisions[0], kind=EngineKind.deepspeed, deepspeed=DeepSpeedConfig(stage))
    return cases, {f"megatron {name}": reason for name, reason in left_out.items()}


def conduct(options: argparse.Namespace) -> int:
    """Start the ranks and print the table."""
    results = Results(options.out)
    cases, left_out = all_cases(CPU if options.cpu else GPU, options.gpus)
    for name, reason in left_out.items():
        results.row(PART, name, left_out=reason)
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder))
        ranks = Ranks("tests.multi_gpu.agree_on_ranks", options.gpus, *arguments_of_ranks(options, journal.folder))
        run_cases(
            PART,
            ranks,
            chosen(list(cases), options.only),
            options.out,
            journal,
            LIMITS.scaled(patience(cpu=options.cpu)),
        )
        return summary(journal.done, options.out)


if __name__ == "__main__":
    sys.exit(main(conduct))
