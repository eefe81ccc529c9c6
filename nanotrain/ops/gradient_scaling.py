"""The gradients that the linear losses have made in their forward pass, times the gradient that reaches the loss."""

import torch
from torch import Tensor

from nanotrain.ops.backends import kernel_for

_SCALED_AT_ONCE = 2**25
"""Values of a narrow gradient that exist in fp32 beside it: 128 MiB."""


def scale_gradients(gradients: list[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """Multiply by `factor` [] in place: a copy of the weight's gradient would be the largest tensor of the loss.

    A gradient narrower than the factor is multiplied in the factor's dtype, because torch would round the factor first:
    1 / 7789 in bf16 is 0.28% too large, and all gradients behind the head would be.
    """
    for gradient in gradients:
        if gradient is None:
            continue
        if gradient.dtype.itemsize >= factor.dtype.itemsize:
            gradient.mul_(factor.to(gradient.dtype))
            continue
        scale = kernel_for("gradient_scaling", gradient, factor) or scale_in_place_ref
        scale(gradient, factor)
    return gradients


def scale_in_place_ref(gradient: Tensor, factor: Tensor) -> None:
    """Multiply `gradient`, contiguous, by `factor` [] in the factor's dtype, and round once."""
    for part in gradient.view(-1).split(_SCALED_AT_ONCE):
        torch.mul(part.to(factor.dtype), factor, out=part)
