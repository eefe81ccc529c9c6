"""relu(x)^2, the activation of the MLP layers."""

import torch.nn.functional as F
from torch import Tensor

from nanotrain.ops.backends import kernel_for


def squared_relu(x: Tensor) -> Tensor:
    """Return relu(x)^2, any shape, in x's dtype."""
    kernel = kernel_for("squared_relu", x)
    if kernel is not None:
        return kernel(x)
    return F.relu(x).square()


def squared_relu_ref(x: Tensor) -> Tensor:
    """Slow twin of `squared_relu`: fp64, by cases."""
    wide = x.double()
    return (wide * wide * (wide > 0)).to(x.dtype)
