"""Depthwise causal convolution with SiLU: the short mixing of neighbours at the head of a Mamba-2 mixer.

The fast form is a sum of K shifted products with its own backward: on CPU about three times faster than a depthwise
`conv1d`, and a tap that would cross a document border is simply left out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanotrain.ops.backends import kernel_for
from nanotrain.ops.segments import segment_indices


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, *, segment_ids: Tensor | None = None, initial_state: Tensor | None = None
) -> Tensor:
    """Return silu(bias + sum over k of weight[:, 0, k] * x[:, t - (K - 1) + k]); what lies before the document is 0.

    Computed in fp32 (fp64 when x or the weight is), whatever autocast says, and cast to x's dtype.

    Args:
        x: [B, S, C].
        weight: [C, 1, K].
        bias: [C].
        segment_ids: [B, S]; taps from another document count as 0.
        initial_state: [B, K - 1, C], the inputs before x; they belong to the first document of each row.

    Returns:
        [B, S, C].
    """
    kernel = kernel_for("causal_conv1d", x)
    if kernel is not None and initial_state is None and weight.shape[-1] in (2, 3, 4) and x.shape[-1] % 8 == 0:
        return kernel(x, weight, bias, segment_ids=segment_ids)
    num_before = weight.shape[-1] - 1
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    index = None if segment_ids is None else segment_indices(segment_ids)
    extended = x.to(dtype)
    if initial_state is not None:
        extended = torch.cat([initial_state.to(dtype), extended], dim=1)
        if index is not None:
            index = torch.cat([index[:, :1].expand(-1, num_before), index], dim=1)
    same = []
    if index is not None:
        distances = range(1, min(num_before, index.shape[1] - 1) + 1)
        same = [(index[:, d:] == index[:, :-d]).to(dtype)[..., None] for d in distances]
    y = _ShiftedProducts.apply(extended, weight.to(dtype), bias.to(dtype), same)
    return y[:, y.shape[1] - x.shape[1] :].to(x.dtype)


class _ShiftedProducts(torch.autograd.Function):
    """x [B, S, C], weight [C, 1, K], bias [C], same[d - 1] [B, S - d, 1]: 1 where t and t - d share a document."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, same: list[Tensor]) -> Tensor:
        taps = weight[:, 0].flip(-1)
        y = torch.addcmul(bias, x, taps[:, 0])
        for d in range(1, min(taps.shape[1], x.shape[1])):
            past = x[:, :-d] * same[d - 1] if same else x[:, :-d]
            y[:, d:].addcmul_(past, taps[:, d])
        ctx.save_for_backward(x, taps, y, *same)
        return F.silu(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, taps, y, *same = ctx.saved_tensors
        grad = torch.ops.aten.silu_backward(grad_outputs[0], y)
        grad_x = grad * taps[:, 0]
        grad_taps = torch.zeros_like(taps)
        grad_taps[:, 0] = (grad * x).sum((0, 1))
        for d in range(1, min(taps.shape[1], x.shape[1])):
            late = grad[:, d:] * same[d - 1] if same else grad[:, d:]
            grad_x[:, :-d].addcmul_(late, taps[:, d])
            grad_taps[:, d] = (late * x[:, :-d]).sum((0, 1))
        return grad_x, grad_taps.flip(-1)[:, None], grad.sum((0, 1)), None


def causal_conv1d_ref(
    x: Tensor, weight: Tensor, bias: Tensor, *, segment_ids: Tensor | None = None, initial_state: Tensor | None = None
) -> Tensor:
    """Slow twin of `causal_conv1d`: fp64, one position and tap at a time."""
    batch, length, channels = x.shape
    num_before = weight.shape[-1] - 1
    before = x.new_zeros(batch, num_before, channels) if initial_state is None else initial_state
    inputs = torch.cat([before.double(), x.double()], dim=1)
    rows = []
    for b in range(batch):
        for t in range(length):
            value = bias.double()
            border = False
            for d in range(num_before + 1):
                if segment_ids is not None and 0 < d <= t:
                    border = border or bool(segment_ids[b, t - d] != segment_ids[b, t - d + 1])
                if not border:
                    value = value + weight[:, 0, num_before - d].double() * inputs[b, t + num_before - d]
            rows.append(value * torch.sigmoid(value))
    return torch.stack(rows).reshape(x.shape).to(x.dtype)
