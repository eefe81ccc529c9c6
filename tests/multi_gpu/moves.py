"""Which states move where in `faults`; the ranks are reshard.py's."""

from nanotrain.config.engine import EngineConfig, EngineKind
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.parallel import DataParallel
from tests.multi_gpu.shapes import Shape

PART = "faults"
STALL = "save stall"


def cases_of(shape: Shape, size: int) -> dict[str, EngineConfig]:
    """Return the cases of `size` ranks by name; `<kind>: saves ...` comes before `<kind>: loads ...`.

    Sizes of Megatron are those of the layout saved: tensor parallel 2; what is left of the ranks is data-parallel.
    """
    plain = shape.precisions[0]
    fsdp2 = shape.engine(plain, data_parallel=DataParallel.fsdp2)
    cases = {f"fsdp2: saves on {size}": fsdp2, f"fsdp2: loads on {size}": fsdp2}
    layouts = {
        "tp2": MegatronConfig(tensor_parallel=2, sequence_parallel=True),
        "pp2": MegatronConfig(pipeline_parallel=2),
        "cp2": MegatronConfig(context_parallel=2),
        f"dp{size}": MegatronConfig(),
    }
    for precision in shape.precisions:
        kind = f"megatron {precision.value}"
        for number, (name, layout) in enumerate(layouts.items()):
            config = shape.engine(precision, kind=EngineKind.megatron, megatron=layout)
            if number == 0:
                cases[f"{kind}: saves at {name}"] = config
            cases[f"{kind}: loads at {name}"] = config
        if precision is plain:
            cases[STALL] = fsdp2
    return cases


def fewer_ranks(shape: Shape, size: int) -> dict[str, EngineConfig]:
    """Return the case of a start on fewer ranks than those that saved; one rank has no FSDP2."""
    data_parallel = DataParallel.fsdp2 if size > 1 else DataParallel.auto
    return {f"fsdp2: loads on {size}": shape.engine(shape.precisions[0], data_parallel=data_parallel)}
