"""Where parameters live and in which dtype, and the norm of their gradients."""

import torch
from torch import Tensor, nn

from nanotrain.config.errors import UserError
from nanotrain.config.training import ParameterDtype, TrainingConfig
from nanotrain.model.hybrid import HybridModel
from nanotrain.model.linear import Linear
from nanotrain.ops.linear import WeightCopy


def parameter_dtype(training: TrainingConfig | None, autocast_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the weights; A_log, D and dt_bias stay fp32 whatever it is.

    Raises:
        UserError: bf16 weights under products in fp32.
    """
    if training is None or training.optimizer.parameter_dtype is ParameterDtype.fp32:
        return torch.float32
    if autocast_dtype is None:
        raise UserError(
            "`stage.training.optimizer.parameter_dtype` (bf16) contradicts `engine.precision`, which came out as fp32 on"
            " this device; set engine.precision=bf16, or parameter_dtype=fp32."
        )
    return torch.bfloat16


def place_model(model: HybridModel, device: torch.device, dtype: torch.dtype) -> HybridModel:
    """Move `model` to `device` in `dtype`, tensor by tensor; one on the meta device gets storage there, still unset."""
    narrow = dtype is not torch.float32
    if any(parameter.is_meta for parameter in model.parameters()):
        return (model.to(dtype) if narrow else model).to_empty(device=device)
    return model.to(device, dtype) if narrow else model.to(device)


def weight_copies_of(model: nn.Module) -> dict[Tensor, WeightCopy]:
    """Return the copy in another precision of each weight that has one."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    return {layer.weight: layer.weight_copy for layer in layers if layer.weight_copy is not None}


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Return the L2 norm [] fp32 over all gradients, summed in fp32 whatever their dtype."""
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))
