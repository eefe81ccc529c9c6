"""Updates each parameter as soon as its gradient is ready and frees the gradient, so that no two whole gradients exist.

What is not finite is never written, and nothing waits for the device to say so. A loss that is not finite forbids every
update of its step. A gradient that is not finite forbids its own update and all later ones of the step (those of the
layers below, which it would have reached); the tensors already updated keep their finite update. Both count as skipped.
"""

import weakref

import torch
from torch import Tensor

from nanotrain.ops.linear import WeightCopy
from nanotrain.optim.low_precision_adamw import LowPrecisionAdamW


class OptimizerInBackward:
    """Hooks on the parameters of an optimizer. One step: `begin`, the backward pass, `finish`."""

    def __init__(self, optimizer: LowPrecisionAdamW, weight_copies: dict[Tensor, WeightCopy]) -> None:
        """Hook into every parameter of `optimizer`; a weight's copy in another precision is dropped when it changes."""
        self._optimizer = optimizer
        self._weight_copies = weight_copies
        self._allowed: Tensor | None = None
        self._squared_norm: Tensor | None = None
        # Weak: a parameter that owned this object would own itself, through storage that no garbage collector looks into.
        this = weakref.ref(self)

        def update(parameter: Tensor) -> None:
            owner = this()
            assert owner is not None, "the engine of this model is gone"
            owner._update(parameter)

        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(update)

    def begin(self, loss: Tensor) -> None:
        """Start a step whose loss is `loss` []."""
        self._allowed = torch.isfinite(loss.detach())
        self._squared_norm = torch.zeros((), dtype=torch.float64, device=loss.device)

    def _update(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None and self._allowed is not None and self._squared_norm is not None
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._allowed = self._allowed & torch.isfinite(norm)
        self._squared_norm += norm.double().square()
        self._optimizer.update(parameter, gradient, self._allowed)
        if parameter in self._weight_copies:
            self._weight_copies[parameter].drop()

    def finish(self) -> tuple[float, bool]:
        """Wait for the step; return the global L2 norm of its gradient and whether anything was left out."""
        assert self._allowed is not None and self._squared_norm is not None
        grad_norm, complete = float(self._squared_norm.sqrt()), bool(self._allowed)
        if complete:
            self._optimizer.count_step()
        self._allowed = self._squared_norm = None
        return grad_norm, not complete
