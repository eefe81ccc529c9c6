"""Layouts of the run on several GPUs: all of them can be built at the GPU's shape, in bf16 and in FP8."""

import pytest

from nanotrain.config.engine import EngineKind
from nanotrain.planning.layout import check_layout
from tests.multi_gpu.agree import all_cases
from tests.multi_gpu.layouts import megatron_layouts
from tests.multi_gpu.shapes import CPU, GPU, Shape


@pytest.mark.parametrize("shape", [CPU, GPU])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_layout_that_is_tried_can_be_built(size: int, shape: Shape) -> None:
    cases, left_out = all_cases(shape, size)
    tried = [case.engine for case in cases.values() if case.engine.kind is EngineKind.megatron]
    for engine in tried:
        engine.validate("engine")
        layout = check_layout(shape.model, shape.training(), engine, size)
        assert layout.world_size == size
    names, _ = megatron_layouts(size)
    saveable = [layout for layout in names.values() if shape is CPU or layout.distributed_optimizer]
    assert len(tried) == (len(saveable) + 2) * len(shape.precisions)  # two also on plain rows
    assert {name.removeprefix("megatron ") for name in left_out} | names.keys() >= {f"tp{size} sp", f"cp{size}", "pp4"}
