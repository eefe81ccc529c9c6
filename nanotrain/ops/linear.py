"""x @ weight.T, with the weight as a plain parameter and the products in FP8 or bf16 where a precision asks for it.

The one idea: a layer holds a `WeightCopy`, the quantised weight of the current optimizer step. It is made at the first
use and serves forward and backward of all micro-batches of the step; a change of the weight makes a new one.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanotrain.ops.fp8 import Quantized


class QuantizedProducts(Protocol):
    """A library's FP8 quantisers and products. Matrices are [T, K] activations, [N, K] weights, [T, N] gradients."""

    row_multiple: int
    """T must be a multiple of it; `linear` pads."""
    squared_relu_quantised: Callable[[Tensor, Tensor | None], Quantized] | None
    """relu(x)^2 of x [T, K], or its gradient 2 relu(x) grad, quantised as `quantize_activation` does; None = unfused."""

    def quantize_activation(self, x: Tensor, *, columns: bool) -> Quantized: ...

    def quantize_gradient(self, grad: Tensor) -> Quantized: ...

    def quantize_weight(self, weight: Tensor) -> Quantized: ...

    def output(self, x: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        """Return x @ weight.T, [T, N]."""
        ...

    def input_gradient(self, grad: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        """Return grad @ weight, [T, K]."""
        ...

    def weight_gradient(self, grad: Quantized, x: Quantized, dtype: torch.dtype) -> Tensor:
        """Return grad.T @ x, [N, K]."""
        ...


class RoundedProducts:
    """Products in bf16 of operands in any dtype, with the weight rounded once a step instead of once a micro-batch.

    The weight's gradient leaves the GPU's product in the weight's own dtype, not rounded to bf16 in between.
    """

    row_multiple = 1
    squared_relu_quantised = None

    def quantize_activation(self, x: Tensor, *, columns: bool) -> Quantized:
        return _rounded(x, columns)

    def quantize_gradient(self, grad: Tensor) -> Quantized:
        return _rounded(grad, True)

    def quantize_weight(self, weight: Tensor) -> Quantized:
        return _rounded(weight, True)

    def output(self, x: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        assert x.rows is not None and weight.rows is not None
        return (x.rows @ weight.rows.t()).to(dtype)

    def input_gradient(self, grad: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        assert grad.rows is not None and weight.rows is not None
        return (grad.rows @ weight.rows).to(dtype)

    def weight_gradient(self, grad: Quantized, x: Quantized, dtype: torch.dtype) -> Tensor:
        assert grad.columns is not None and x.columns is not None
        if grad.columns.is_cuda and dtype == torch.float32:
            return torch.mm(grad.columns.t(), x.columns, out_dtype=dtype)
        return (grad.columns.t() @ x.columns).to(dtype)


def _rounded(matrix: Tensor, columns: bool) -> Quantized:
    """bf16 needs no second direction: `columns` is the same storage, not transposed."""
    rounded = matrix.to(torch.bfloat16)
    return Quantized(rounded, None, rounded if columns else None, None)


class WeightCopy:
    """The FP8 (or bf16) copy of one weight, remade when the weight changes.

    A change is seen by the tensor's version counter; what writes past it (torch's fused optimizers, kernels of our own)
    must be followed by `drop`.
    """

    def __init__(self, products: QuantizedProducts, *, keep: bool = True) -> None:
        """Args: products: the library. keep: False makes a copy for each use, for weights that are whole only then."""
        self.products = products
        self._keep = keep
        self._copy: Quantized | None = None
        self._version = -1

    def of(self, weight: Tensor) -> Quantized:
        """Return the copy of `weight` [N, K] as it is now."""
        if not self._keep:
            return self.products.quantize_weight(weight.detach())
        if self._copy is None or self._version != weight._version:
            self._copy = self.products.quantize_weight(weight.detach())
            self._version = weight._version
        return self._copy

    def drop(self) -> None:
        """Free the copy."""
        self._copy = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightCopy":
        return WeightCopy(self.products, keep=self._keep)


def linear(x: Tensor, weight: Tensor, copy: WeightCopy | None = None) -> Tensor:
    """Return x @ weight.T.

    Args:
        x: [..., K].
        weight: [N, K], fp32 or bf16.
        copy: the weight's FP8 or bf16 copy; None = the product runs in the dtype of the operands, or autocast's.

    Returns:
        [..., N]; with a copy in autocast's dtype where it is on, else bf16. Gradients have the dtypes of x and weight.
    """
    return linears(x, [weight], [copy])[0]


def linears(x: Tensor, weights: Sequence[Tensor], copies: Sequence[WeightCopy | None]) -> tuple[Tensor, ...]:
    """Return what `linear` returns for each weight; an input of copies of one library is quantised once for all."""
    kept = [copy for copy in copies if copy is not None]
    if len(kept) == len(copies) and all(copy.products is kept[0].products for copy in kept):
        return _QuantizedLinears.apply(x, kept, *weights)
    apart = zip(weights, copies, strict=True)
    return tuple(F.linear(x, w) if copy is None else _QuantizedLinears.apply(x, [copy], w)[0] for w, copy in apart)


def linear_ref(x: Tensor, weight: Tensor) -> Tensor:
    """Slow twin of `linear`: fp64, one output at a time."""
    rows = [torch.stack([row.double() @ w.double() for w in weight]) for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).reshape(*x.shape[:-1], -1).to(x.dtype)


class _QuantizedLinears(torch.autograd.Function):
    """Products of one input with several weights of one library."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Sequence[WeightCopy], *weights: Tensor) -> tuple[Tensor, ...]:
        products = copies[0].products
        flat = padded_rows(x.reshape(-1, x.shape[-1]), products.row_multiple)
        wants_weight_gradient = any(ctx.needs_input_grad[2:])
        quantized = products.quantize_activation(flat, columns=wants_weight_gradient)
        dtype, rows = output_dtype(x.device), x.numel() // x.shape[-1]
        outputs = [products.output(quantized, copy.of(w), dtype) for copy, w in zip(copies, weights, strict=True)]
        if wants_weight_gradient:
            ctx.save_for_backward(quantized.columns, quantized.column_scales, *weights)
        else:
            ctx.save_for_backward(None, None, *weights)
        ctx.copies, ctx.shape, ctx.dtype = copies, x.shape, x.dtype
        return tuple(y[:rows].view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        columns, scales, *weights = ctx.saved_tensors
        x, products = Quantized(None, None, columns, scales), ctx.copies[0].products
        grad_x: Tensor | None = None
        grad_weights: list[Tensor | None] = []
        for index, (grad, weight, copy) in enumerate(zip(grad_outputs, weights, ctx.copies, strict=True)):
            quantized = products.quantize_gradient(
                padded_rows(grad.reshape(-1, weight.shape[0]), products.row_multiple)
            )
            if ctx.needs_input_grad[0]:
                part = products.input_gradient(quantized, copy.of(weight), ctx.dtype)
                grad_x = part if grad_x is None else grad_x.add_(part)
            wanted = ctx.needs_input_grad[2 + index]
            grad_weights.append(products.weight_gradient(quantized, x, weight.dtype) if wanted else None)
        if grad_x is not None:
            grad_x = grad_x[: ctx.shape.numel() // ctx.shape[-1]].view(ctx.shape)
        return grad_x, None, *grad_weights


def padded_rows(matrix: Tensor, multiple: int) -> Tensor:
    """Return `matrix` [T, K], contiguous, with rows of zeros up to a multiple; they change no other row's product."""
    missing = -matrix.shape[0] % multiple
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix.contiguous()


def output_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which products of copies come out."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.bfloat16
