"""RMSNorm in one pass over memory each way, the gradient of the branch beside it included.

The weight's gradient is summed per program in fp32, then over programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _forward(x_ptr, weight_ptr, y_ptr, scale_ptr, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(scale_ptr + row, scale)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + columns, x * scale * weight, mask=inside)


@triton.jit
def _backward(
    x_ptr, weight_ptr, scale_ptr, grad_ptr, residual_ptr, out_ptr, partial_ptr, rows, width, rows_per_program,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    first = program.to(tl.int64) * rows_per_program
    for i in range(tl.minimum(rows_per_program, rows - first)):
        row = first + i
        at = row * width + columns
        scale = tl.load(scale_ptr + row)
        normed = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad_weight += grad * normed
        grad *= weight
        mean = tl.sum(grad * normed, axis=0) / width
        out = (grad - normed * mean) * scale
        if RESIDUAL:
            out += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, out, mask=inside)
    tl.store(partial_ptr + program * width + columns, grad_weight, mask=inside)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normed x, x as rows, and their scales."""
    flat = x.contiguous().view(-1, x.shape[-1])
    rows, width = flat.shape
    y = torch.empty(x.shape, dtype=_output_dtype(x, weight), device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _forward[(rows,)](flat, weight, y, scale, width, eps, BLOCK=block, num_warps=_warps(block))
    return y, flat, scale


def _gradients(
    grad: Tensor, flat: Tensor, weight: Tensor, scale: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, plus `residual` in the same pass, and of the weight."""
    rows, width = flat.shape
    grad = grad.contiguous()
    out = torch.empty_like(flat)
    processors = torch.cuda.get_device_properties(flat.device).multi_processor_count if flat.is_cuda else 2
    programs = min(rows, 2 * processors)
    partial = torch.empty(programs, width, dtype=torch.float32, device=flat.device)
    block = triton.next_power_of_2(width)
    _backward[(programs,)](
        flat, weight, scale, grad, grad if residual is None else residual.contiguous(), out, partial,
        rows, width, triton.cdiv(rows, programs), RESIDUAL=residual is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out.view(grad.shape), partial.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, flat, scale = _normed(x, weight, eps)
        ctx.save_for_backward(flat, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        flat, weight, scale = ctx.saved_tensors
        return *_gradients(grad_outputs[0], flat, weight, scale, None), None


class _BranchRMSNorm(torch.autograd.Function):
    """x goes through twice, so that both gradients meet here and are added in the same pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, flat, scale = _normed(x, weight, eps)
        ctx.save_for_backward(flat, weight, scale)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        flat, weight, scale = ctx.saved_tensors
        return *_gradients(grad_outputs[0], flat, weight, scale, grad_outputs[1]), None


def _output_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on: what follows a norm is a matrix product, which would round to it anyway."""
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return torch.promote_types(x.dtype, weight.dtype)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, branch: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """See ops.rms_norm.rms_norm, or with `branch` branch_rms_norm; rounded once, after the weight, under autocast to its dtype."""
    return (_BranchRMSNorm if branch else _RMSNorm).apply(x, weight, eps)
