"""RMSNorm(y * silu(z)) in groups, in one pass over memory each way. z may be a slice of wider rows."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanotrain.ops.gpu.widths import split_width


@triton.jit
def _gate(y_ptr, z_ptr, columns, inside):
    """Return y, z and sigmoid(z) in fp32; 0 outside."""
    y = tl.load(y_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return y, z, tl.sigmoid(z)


@triton.jit
def _forward(
    y_ptr, z_ptr, weight_ptr, out_ptr, scale_ptr, width, stride_z, eps,
    GROUP: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    y_ptr += row * width + group * GROUP
    z_ptr += row * stride_z + group * GROUP
    out_ptr += row * width + group * GROUP
    c0, c1 = tl.arange(0, W0), W0 + tl.arange(0, W1)
    y0, z0, sigmoid0 = _gate(y_ptr, z_ptr, c0, c0 < GROUP)
    y1, z1, sigmoid1 = _gate(y_ptr, z_ptr, c1, c1 < GROUP)
    g0, g1 = y0 * z0 * sigmoid0, y1 * z1 * sigmoid1
    scale = 1.0 / tl.sqrt((tl.sum(g0 * g0, axis=0) + tl.sum(g1 * g1, axis=0)) / GROUP + eps)
    tl.store(scale_ptr + row * tl.num_programs(1) + group, scale)
    weight_ptr += group * GROUP
    tl.store(out_ptr + c0, g0 * scale * tl.load(weight_ptr + c0, mask=c0 < GROUP, other=0.0), mask=c0 < GROUP)
    tl.store(out_ptr + c1, g1 * scale * tl.load(weight_ptr + c1, mask=c1 < GROUP, other=0.0), mask=c1 < GROUP)


@triton.jit
def _gradients(y, z, sigmoid, scale, weight, grad):
    """Return normed, the gradient of normed, silu(z) and y * silu'(z)."""
    silu = z * sigmoid
    return y * silu * scale, grad * weight, silu, y * sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def _backward(
    y_ptr, z_ptr, weight_ptr, scale_ptr, grad_ptr, grad_y_ptr, grad_z_ptr, partial_ptr,
    rows, rows_per_program, width, stride_z, stride_grad_z,
    GROUP: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
):  # fmt: skip
    program, group = tl.program_id(0), tl.program_id(1)
    c0, c1 = tl.arange(0, W0), W0 + tl.arange(0, W1)
    weight_ptr += group * GROUP
    weight0 = tl.load(weight_ptr + c0, mask=c0 < GROUP, other=0.0).to(tl.float32)
    weight1 = tl.load(weight_ptr + c1, mask=c1 < GROUP, other=0.0).to(tl.float32)
    grad_weight0 = tl.zeros((W0,), dtype=tl.float32)
    grad_weight1 = tl.zeros((W1,), dtype=tl.float32)
    first = program.to(tl.int64) * rows_per_program
    for i in range(tl.minimum(rows_per_program, rows - first)):
        row = first + i
        at = row * width + group * GROUP
        z_at = row * stride_z + group * GROUP
        y0, z0, sigmoid0 = _gate(y_ptr + at, z_ptr + z_at, c0, c0 < GROUP)
        y1, z1, sigmoid1 = _gate(y_ptr + at, z_ptr + z_at, c1, c1 < GROUP)
        grad0 = tl.load(grad_ptr + at + c0, mask=c0 < GROUP, other=0.0).to(tl.float32)
        grad1 = tl.load(grad_ptr + at + c1, mask=c1 < GROUP, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row * tl.num_programs(1) + group)
        normed0, inner0, silu0, slope0 = _gradients(y0, z0, sigmoid0, scale, weight0, grad0)
        normed1, inner1, silu1, slope1 = _gradients(y1, z1, sigmoid1, scale, weight1, grad1)
        grad_weight0 += grad0 * normed0
        grad_weight1 += grad1 * normed1
        mean = (tl.sum(inner0 * normed0, axis=0) + tl.sum(inner1 * normed1, axis=0)) / GROUP
        gated0, gated1 = (inner0 - normed0 * mean) * scale, (inner1 - normed1 * mean) * scale
        tl.store(grad_y_ptr + at + c0, gated0 * silu0, mask=c0 < GROUP)
        tl.store(grad_y_ptr + at + c1, gated1 * silu1, mask=c1 < GROUP)
        out = row * stride_grad_z + group * GROUP
        tl.store(grad_z_ptr + out + c0, gated0 * slope0, mask=c0 < GROUP)
        tl.store(grad_z_ptr + out + c1, gated1 * slope1, mask=c1 < GROUP)
    partial_ptr += program * width + group * GROUP
    tl.store(partial_ptr + c0, grad_weight0, mask=c0 < GROUP)
    tl.store(partial_ptr + c1, grad_weight1, mask=c1 < GROUP)


def forward(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return the output [T, D] in y's dtype and the scales [T, G] that `backward` needs.

    Args:
        y: [T, D] contiguous.
        z: [T, D]; only its columns must be contiguous.
        weight: [D].
        eps: added to the mean square.
        num_groups: divides D.
    """
    rows, width = y.shape
    out = torch.empty_like(y)
    scale = torch.empty(rows, num_groups, dtype=torch.float32, device=y.device)
    large, rest = split_width(width // num_groups)
    _forward[(rows, num_groups)](
        y, z, weight, out, scale, width, z.stride(0), eps, GROUP=width // num_groups, W0=large, W1=rest, num_warps=4
    )
    return out, scale


def backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, scale: Tensor, grad_z: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of y, z and the weight.

    Args:
        grad: [T, D] contiguous, of the output.
        y: as in `forward`.
        z: as in `forward`.
        weight: as in `forward`.
        scale: from `forward`.
        grad_z: [T, D] to write z's gradient into, a slice of wider rows for example; None = a new tensor.
    """
    rows, width = y.shape
    num_groups = scale.shape[1]
    grad_y = torch.empty_like(y)
    if grad_z is None:
        grad_z = torch.empty(rows, width, dtype=z.dtype, device=z.device)
    processors = torch.cuda.get_device_properties(y.device).multi_processor_count if y.is_cuda else 2
    programs = min(rows, max(8 * processors // num_groups, 1))
    partial = torch.empty(programs, width, dtype=torch.float32, device=y.device)
    large, rest = split_width(width // num_groups)
    _backward[(programs, num_groups)](
        y, z, weight, scale, grad, grad_y, grad_z, partial,
        rows, triton.cdiv(rows, programs), width, z.stride(0), grad_z.stride(0),
        GROUP=width // num_groups, W0=large, W1=rest, num_warps=4,
    )  # fmt: skip
    return grad_y, grad_z, partial.sum(0).to(weight.dtype)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
        flat_y, flat_z = y.reshape(-1, y.shape[-1]).contiguous(), z.reshape(-1, z.shape[-1])
        out, scale = forward(flat_y, flat_z, weight, eps, num_groups)
        ctx.save_for_backward(flat_y, flat_z, weight, scale)
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        grad = grad_outputs[0]
        grad_y, grad_z, grad_weight = backward(grad.reshape(-1, grad.shape[-1]).contiguous(), *ctx.saved_tensors)
        return grad_y.view(grad.shape), grad_z.view(grad.shape), grad_weight, None, None


def grouped_gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
    """See ops.rms_norm.grouped_gated_rms_norm; rounded once, after the weight."""
    return _GatedNorm.apply(y, z, weight, eps, num_groups)
