"""The gradient of the scan's inputs x: one kernel, in which a program walks heads of a group over a part of a chunk.

The scores B_j . C_i are the same for all heads of a group. A program makes its part once and keeps it in registers;
mamba-ssm reads it in fp32 for every head.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How the work is cut: rows of a chunk and heads of a group in a program, warps and stages of loads."""

    rows: int
    heads: int
    warps: int
    stages: int


LAUNCH = Launch(rows=128, heads=16, warps=8, stages=2)
"""For 2-byte numbers."""
SMALL_LAUNCH = Launch(rows=32, heads=16, warps=4, stages=2)
"""For fp32, whose tiles take twice the memory, and where an operand would be narrow."""
NARROW = 64
"""Triton's wgmma was seen to be wrong with operands of 16 and 32 columns: values are padded to this many."""


_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _inputs(
    grad_ptr, B_ptr, C_ptr, states_ptr, dt_ptr, decay_ptr, D_ptr, segment_ptr, out_ptr,
    length, num_chunks, stride_grad_batch, stride_grad, stride_B_batch, stride_B, stride_C_batch, stride_C,
    stride_out_batch, stride_out,
    HEADS: tl.constexpr, WALKED: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr,
    N: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Positions j take gradients from positions i >= j of their chunk and from the state that leaves it."""
    tile, batch_chunk, group = tl.program_id(0) % (L // ROWS), tl.program_id(1), tl.program_id(2)
    part = tl.program_id(0) // (L // ROWS)
    batch, chunk = batch_chunk // num_chunks, batch_chunk % num_chunks
    start = chunk * L
    i, j = tl.arange(0, L), tile * ROWS + tl.arange(0, ROWS)
    n, p = tl.arange(0, N), tl.arange(0, PADDED)
    p_inside = p < P
    last = tl.minimum(L, length - start) - 1
    # Behind the end of the row its last position stands in: scores are zero there, and nothing is stored.
    i_row, j_row = tl.minimum(i, last), tl.minimum(j, last)
    B_ptr += batch.to(tl.int64) * stride_B_batch + start.to(tl.int64) * stride_B + group * N
    C_ptr += batch.to(tl.int64) * stride_C_batch + start.to(tl.int64) * stride_C + group * N
    B = tl.load(B_ptr + j_row[:, None] * stride_B + n[None, :])
    C = tl.load(C_ptr + i_row[None, :] * stride_C + n[:, None])
    seen = (i[None, :] >= j[:, None]) & (i[None, :] <= last)
    if PACKED:
        ids = segment_ptr + batch.to(tl.int64) * length + start
        seen = seen & (tl.load(ids + i_row)[None, :] == tl.load(ids + j_row)[:, None])
        leaves = tl.load(ids + j_row) == tl.load(ids + last)
    scores = tl.where(seen, tl.dot(B, C), 0.0)
    head = group * HEADS + part * WALKED
    grad_ptr += batch.to(tl.int64) * stride_grad_batch + start.to(tl.int64) * stride_grad + head * P
    out_ptr += batch.to(tl.int64) * stride_out_batch + start.to(tl.int64) * stride_out + head * P
    states_ptr += (batch_chunk.to(tl.int64) * (GROUPS * HEADS) + head) * (P * N)
    row = ((batch * GROUPS * HEADS + head).to(tl.int64) * num_chunks + chunk) * L
    dt_ptr += row
    decay_ptr += row
    D_ptr += head
    for _ in range(WALKED):
        decay_i, decay_j = tl.load(decay_ptr + i) * _LOG2_E, tl.load(decay_ptr + j) * _LOG2_E
        to_end = tl.exp2(tl.minimum(tl.load(decay_ptr + L - 1) * _LOG2_E - decay_j, 0.0))
        if PACKED:
            to_end = tl.where(leaves, to_end, 0.0)
        states = tl.load(states_ptr + p[None, :] * N + n[:, None], mask=p_inside[None, :], other=0.0)
        grad = tl.load(grad_ptr + i_row[:, None] * stride_grad + p[None, :], mask=p_inside[None, :], other=0.0)
        dt, D = tl.load(dt_ptr + j), tl.load(D_ptr)
        own = tl.load(grad_ptr + j_row[:, None] * stride_grad + p[None, :], mask=p_inside[None, :], other=0.0)
        total = tl.dot(B, states)
        weights = scores * tl.exp2(tl.minimum(decay_i[None, :] - decay_j[:, None], 0.0))
        total = tl.dot(weights.to(grad.dtype), grad, total * to_end[:, None])
        total = total * dt[:, None] + own.to(tl.float32) * D
        tl.store(
            out_ptr + j[:, None] * stride_out + p[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=(j <= last)[:, None] & p_inside[None, :],
        )
        grad_ptr += P
        out_ptr += P
        states_ptr += P * N
        dt_ptr += num_chunks * L
        decay_ptr += num_chunks * L
        D_ptr += 1


def _launch_of(element_size: int, size: int, padded: int, chunk: int) -> Launch:
    if element_size == 2 and NARROW <= size <= 128 and padded <= 128 and NARROW <= chunk <= 128:
        return LAUNCH
    wide = element_size * max(size, chunk) > 512  # bytes; two stages of these would not fit
    return SMALL_LAUNCH._replace(stages=1) if wide else SMALL_LAUNCH


def gradient_of_inputs(
    grad: Tensor, dt: Tensor, decay: Tensor, B: Tensor, C: Tensor, grad_states: Tensor, D: Tensor, index: Tensor | None,
    out: Tensor, launch: Launch | None = None,
) -> None:  # fmt: skip
    """Write the gradient of x, also through the skip connection D, into `out`.

    Args:
        grad: [B, S, H, P] of the scan's output; heads and values contiguous.
        dt: [B, H, c, L] fp32.
        decay: [B, H, c, L] fp32, running sums of dt A within a chunk.
        B: [B, S, G, N]; groups and values contiguous, N a power of two.
        C: as B.
        grad_states: [B, c, H, P, N], of the states that leave chunks.
        D: [H] fp32.
        index: [B, S] int32, the number of each position's document within its row.
        out: [B, S, H, P]; heads and values contiguous.
        launch: instead of the one for the sizes.
    """
    batch, length, num_heads, head_dim = grad.shape
    num_chunks, chunk = decay.shape[2:]
    groups, size = B.shape[2:]
    padded = max(triton.next_power_of_2(head_dim), NARROW)
    launch = launch or _launch_of(grad.element_size(), size, padded, chunk)
    heads = num_heads // groups
    rows, walked = min(launch.rows, chunk), math.gcd(launch.heads, heads)
    _inputs[(chunk // rows * (heads // walked), batch * num_chunks, groups)](
        grad, B, C, grad_states, dt, decay, D, decay if index is None else index, out,
        length, num_chunks, grad.stride(0), grad.stride(1), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
        out.stride(0), out.stride(1),
        HEADS=heads, WALKED=walked, GROUPS=groups, P=head_dim, PADDED=padded, N=size, L=chunk, ROWS=rows,
        PACKED=index is not None, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
