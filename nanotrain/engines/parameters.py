"""Where parameters live and in which dtype, and the norm of their gradients."""

import torch
from torch import Tensor, nn

from nanotrain.config.errors import UserError
from nanotrain.config.training import ParameterDtype, TrainingConfig
from nanotrain.model.hybrid import HybridModel
from nanotrain.model.linear import Linear
from nanotrain.ops.linear import WeightCopy


def parameter_dtype(training: TrainingConfig | None, autocast_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the matrices; everything else stays fp32 whatever it is.

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


def is_narrowed(parameter: Tensor) -> bool:
    """Return whether a parameter takes the low precision of `parameter_dtype`: matrices do.

    Norms, A_log, D, dt_bias and the convolution stay fp32: 0.02% of the 12B, near 1 in size, where bf16 numbers lie further
    apart than an update moves them.
    """
    return parameter.ndim == 2


def place_model(model: HybridModel, device: torch.device, dtype: torch.dtype) -> HybridModel:
    """Move `model` to `device`, matrices in `dtype`, tensor by tensor; one on the meta device gets storage, still unset."""
    if dtype is not torch.float32:
        for parameter in model.parameters():
            if is_narrowed(parameter):
                parameter.data = parameter.data.to(dtype)
    if any(parameter.is_meta for parameter in model.parameters()):
        return model.to_empty(device=device)
    return model.to(device)


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
