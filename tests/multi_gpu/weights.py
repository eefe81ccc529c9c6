"""Random weights drawn where they live: for timings any will do, and drawing the published ones takes a core minutes a model."""

import torch
from torch import Tensor

from nanotrain.engines.base import Engine
from nanotrain.engines.torch_engine import TorchEngine
from nanotrain.engines.torch_state import local_rows

CONSTANTS = {"A_log": 1.0, "D": 1.0, "dt_bias": -4.6}
STANDARD_DEVIATION = 0.0125


@torch.no_grad()
def draw(engine: Engine) -> None:
    """Set every parameter of this rank: matrices normal, norms one, biases zero, as the initialisation has them in size."""
    generator = torch.Generator(engine.device)
    if isinstance(engine, TorchEngine):
        generator.manual_seed(engine.dp_rank if engine.dp_size > 1 else 0)
        for name, parameter in engine._model.named_parameters():
            rows, _ = local_rows(parameter)
            rows.copy_(_value(name, rows, generator))
        engine._drop_weight_copies()
        return
    from nanotrain.engines.megatron_engine import MegatronEngine

    assert isinstance(engine, MegatronEngine)
    generator.manual_seed(engine._place.tp_rank)  # data- and context-parallel ranks hold the same
    for name, parameter in engine._root.named_parameters():
        engine._values.assign(name, _value(name, parameter, generator))


def _value(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a value for a parameter, fp32, on its device."""
    last = name.rsplit(".", 1)[-1]
    shape, device = like.shape, like.device
    if last in CONSTANTS:
        return torch.full(shape, CONSTANTS[last], device=device)
    if any("norm" in part for part in name.split(".")[-2:]):
        return torch.ones(shape, device=device)
    if "bias" in last:
        return torch.zeros(shape, device=device)
    return STANDARD_DEVIATION * torch.randn(shape, generator=generator, device=device)
