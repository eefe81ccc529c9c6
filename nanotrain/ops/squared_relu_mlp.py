"""down(relu(up(x))^2) with quantised weights as one op, so that the activation is quantised where it is computed."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanotrain.ops.backends import kernel_for
from nanotrain.ops.fp8 import Quantized
from nanotrain.ops.linear import WeightCopy, linear, output_dtype, padded_rows
from nanotrain.ops.squared_relu import squared_relu


def fuses_squared_relu(x: Tensor, up_copy: WeightCopy | None, down_copy: WeightCopy | None) -> bool:
    """Return whether `squared_relu_mlp` has a fused form for x and these copies."""
    if up_copy is None or down_copy is None or up_copy.products is not down_copy.products:
        return False
    return up_copy.products.squared_relu_quantised is not None and kernel_for("squared_relu", x) is not None


def squared_relu_mlp(
    x: Tensor, up: Tensor, down: Tensor, up_copy: WeightCopy | None, down_copy: WeightCopy | None
) -> Tensor:
    """Return relu(x @ up.T)^2 @ down.T, where `fuses_squared_relu` holds.

    Args:
        x: [..., D].
        up: [F, D].
        down: [D, F].
        up_copy: FP8 copy of `up` (ops/linear.py).
        down_copy: the same of `down`; both of one library that quantises squared ReLU.

    Returns:
        [..., D]; dtypes as in `linear`.
    """
    assert up_copy is not None and down_copy is not None
    return _QuantizedMLP.apply(x, up, down, up_copy, down_copy)


def squared_relu_mlp_ref(
    x: Tensor, up: Tensor, down: Tensor, up_copy: WeightCopy | None, down_copy: WeightCopy | None
) -> Tensor:
    """Slow twin of `squared_relu_mlp`: the three ops one after the other."""
    return linear(squared_relu(linear(x, up, up_copy)), down, down_copy)


class _QuantizedMLP(torch.autograd.Function):
    """Neither relu^2 nor its gradient is ever written in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, up_copy: WeightCopy, down_copy: WeightCopy) -> Tensor:
        products, dtype = up_copy.products, output_dtype(x.device)
        assert products.squared_relu_quantised is not None
        flat = padded_rows(x.reshape(-1, x.shape[-1]), products.row_multiple)
        quantized = products.quantize_activation(flat, columns=ctx.needs_input_grad[1])
        before = products.output(quantized, up_copy.of(up), dtype)
        activated = products.squared_relu_quantised(before, None)
        y = products.output(activated, down_copy.of(down), dtype)
        ctx.save_for_backward(
            up, down, before, quantized.columns, quantized.column_scales, activated.columns, activated.column_scales
        )
        ctx.copies, ctx.shape, ctx.dtype = (up_copy, down_copy), x.shape, x.dtype
        return y[: x.numel() // x.shape[-1]].view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        up, down, before, columns, column_scales, activated_columns, activated_scales = ctx.saved_tensors
        up_copy, down_copy = ctx.copies
        products = up_copy.products
        assert products.squared_relu_quantised is not None
        grad = grad_outputs[0].reshape(-1, down.shape[0])
        rows = grad.shape[0]
        quantized = products.quantize_gradient(padded_rows(grad, products.row_multiple))
        grad_x = grad_up = grad_down = None
        if ctx.needs_input_grad[2]:
            activated = Quantized(None, None, activated_columns, activated_scales)
            grad_down = products.weight_gradient(quantized, activated, down.dtype)
        grad_activated = products.input_gradient(quantized, down_copy.of(down), before.dtype)
        quantized = products.squared_relu_quantised(before, grad_activated)
        if ctx.needs_input_grad[0]:
            grad_x = products.input_gradient(quantized, up_copy.of(up), ctx.dtype)[:rows].view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_up = products.weight_gradient(quantized, Quantized(None, None, columns, column_scales), up.dtype)
        return grad_x, grad_up, grad_down, None, None
