"""The SSD scan on the kernels of ssd_triton.py, behind the signature of our op."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanotrain.ops.gpu.ssd_triton import (
    chunk_outputs,
    gradients_of_adding,
    gradients_of_decays,
    gradients_of_reading,
    gradients_within,
    running_sums,
    walk_states,
)
from nanotrain.ops.gpu.widths import split_width
from nanotrain.ops.segments import segment_indices

CHUNK = 64
"""Positions per chunk: one warpgroup's rows of a tensor core instruction. The result does not depend on it."""

LAUNCH = {
    "walk": {"num_warps": 4, "num_stages": 3},
    "outputs": {"num_warps": 4, "num_stages": 2},
    "reading": {"num_warps": 8, "num_stages": 1},
    "adding": {"num_warps": 4, "num_stages": 1},
    "within": {"num_warps": 8, "num_stages": 1},
}
OUTPUT_HEADS = 4
REST = 32
"""Least columns of the rest of a head's width."""
ROWS = 16
"""Chunks per program of the kernels that only add up decays."""


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    chunk_size: int,
    segment_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ops.ssd.ssd_scan. Products run in x's dtype (fp32: TF32), states within a row pass in fp32."""
    del chunk_size
    index = None if segment_ids is None else segment_indices(segment_ids)
    args = (x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), D.float(), index)
    initial = None if initial_state is None else initial_state.float().transpose(2, 3).contiguous()
    y, final = _Scan.apply(*args, initial)
    return y, final.transpose(2, 3)


class _Scan(torch.autograd.Function):
    """States and their gradients are [B, chunks, H, N, P]; what is per position and head is [B, H, chunks x Q]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        index: Tensor | None,
        initial: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, B, C = (_rows_contiguous(t) for t in (x, B, C))
        batch, length, num_heads, width = x.shape
        chunks = triton.cdiv(length, CHUNK)
        dt = F.pad(dt.transpose(1, 2), (0, chunks * CHUNK - length)).contiguous()
        s = torch.empty_like(dt)
        running_sums[(batch * num_heads, triton.cdiv(chunks, ROWS))](dt, A, s, chunks, num_heads, Q=CHUNK, BLOCK=ROWS)
        states, final = _walk(x, B, dt, s, index, initial, reverse=False)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        per_group = num_heads // B.shape[2]
        heads = next(h for h in (OUTPUT_HEADS, 2, 1) if per_group % h == 0)
        chunk_outputs[(chunks, num_heads // heads, batch)](
            x, dt, s, B, C, D, _pointer(index, dt), states, y,
            length, chunks, per_group, num_heads, *_strides(x), *_strides(B), *_strides(C),
            HAS_INDEX=index is not None, HEADS=heads, **_sizes(B, width), **LAUNCH["outputs"],
        )  # fmt: skip
        ctx.save_for_backward(x, dt, s, A, B, C, D, index, initial)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, s, A, B, C, D, index, initial = ctx.saved_tensors
        grad_y, grad_final = grad_outputs
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y.to(x.dtype).contiguous()
        states, _ = _walk(x, B, dt, s, index, initial, reverse=False)
        grad_final = None if grad_final is None else grad_final.contiguous()
        grad_states, grad_initial = _walk(grad_y, C, dt, s, index, grad_final, reverse=True)
        batch, length, num_heads, width = x.shape
        chunks, groups = states.shape[1], B.shape[2]
        sizes: dict[str, Any] = {"HAS_INDEX": index is not None, "HEADS": num_heads // groups, **_sizes(B, width)}
        grid, counts = (chunks, groups, batch), (length, chunks, num_heads)
        indices = _pointer(index, dt)
        added_x, grad_x = torch.empty_like(grad_y), torch.empty_like(grad_y)
        added_b, read_c = (torch.empty(B.shape, dtype=torch.float32, device=x.device) for _ in range(2))
        grad_s, added_dt, grad_dt = (torch.empty_like(dt) for _ in range(3))
        grad_total, grad_d = (dt.new_empty(batch, num_heads, chunks) for _ in range(2))
        grad_b, grad_c = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (B, C))
        gradients_of_reading[grid](
            dt, s, C, indices, states, grad_states, grad_y, read_c, grad_s, grad_total,
            *counts, *_strides(C), **sizes, **LAUNCH["reading"],
        )  # fmt: skip
        gradients_of_adding[grid](
            x, dt, s, B, indices, grad_states, added_b, added_x, added_dt,
            *counts, *_strides(x), *_strides(B), **sizes, **LAUNCH["adding"],
        )  # fmt: skip
        gradients_within[grid](
            x, dt, s, B, C, D, indices, grad_y, added_x, added_dt, added_b, read_c,
            grad_x, grad_dt, grad_s, grad_total, grad_b, grad_c, grad_d, *counts,
            *_strides(x), *_strides(B), *_strides(C), *_strides(grad_x), *_strides(grad_b), *_strides(grad_c),
            **sizes, **LAUNCH["within"],
        )  # fmt: skip
        blocks = triton.cdiv(chunks, ROWS)
        grad_a = dt.new_empty(batch, num_heads, blocks)
        gradients_of_decays[(batch * num_heads, blocks)](
            dt, A, grad_s, grad_total, grad_dt, grad_a, chunks, num_heads, Q=CHUNK, BLOCK=ROWS
        )
        grad_dt = grad_dt[..., :length].transpose(1, 2)
        grad_initial = grad_initial if initial is not None else None
        return grad_x, grad_dt, grad_a.sum((0, 2)), grad_b, grad_c, grad_d.sum((0, 2)), None, grad_initial


def _walk(
    value: Tensor, inner: Tensor, dt: Tensor, s: Tensor, index: Tensor | None, initial: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the states at all chunks in value's dtype, and the last one in fp32 [B, H, N, P]."""
    batch, length, num_heads, width = value.shape
    size, chunks = inner.shape[-1], triton.cdiv(length, CHUNK)
    states = torch.empty(batch, chunks, num_heads, size, width, dtype=value.dtype, device=value.device)
    final = torch.empty(batch, num_heads, size, width, dtype=torch.float32, device=value.device)
    walk_states[(num_heads, batch)](
        value, inner, dt, s, _pointer(index, dt), _pointer(initial, dt), states, final,
        length, chunks, num_heads // inner.shape[2], num_heads, *_strides(value), *_strides(inner),
        HAS_INDEX=index is not None, HAS_INITIAL=initial is not None, REVERSE=reverse,
        **_sizes(inner, width), **LAUNCH["walk"],
    )  # fmt: skip
    return states, final


def _rows_contiguous(t: Tensor) -> Tensor:
    """Return `t` [B, S, H, P] with heads next to each other in a row; a slice of wider rows stays as it is."""
    return t if t.stride(3) == 1 and t.stride(2) == t.shape[3] else t.contiguous()


def _strides(t: Tensor) -> tuple[int, int]:
    return t.stride(0), t.stride(1)


def _sizes(inner: Tensor, width: int) -> dict[str, int]:
    large, rest = split_width(width, least=REST)
    return {"Q": CHUNK, "N": inner.shape[-1], "P": width, "P0": large, "P1": rest}


def _pointer(tensor: Tensor | None, instead: Tensor) -> Tensor:
    return instead if tensor is None else tensor
