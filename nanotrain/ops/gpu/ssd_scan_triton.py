"""The scan's outputs and the gradient of its inputs x: a program walks heads of a group over some rows of a chunk.

The scores B_j . C_i are the same for all heads of a group. A program makes its part once and keeps it in registers;
mamba-ssm reads it in fp32 for every head.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How the work is cut: rows of a chunk and heads of a group in a program, warps and stages of loads."""

    rows: int
    heads: int
    warps: int
    stages: int


LAUNCH = Launch(rows=128, heads=16, warps=8, stages=3)
"""For 2-byte numbers, where a block may have all of Hopper's shared memory; the fastest of six (docs/benchmarks/one_gpu_h200_202611.md)."""
LEAN_LAUNCH = Launch(rows=64, heads=16, warps=4, stages=1)
"""The same on other GPUs: 81 KB."""
SMALL_LAUNCH = Launch(rows=32, heads=16, warps=4, stages=2)
"""For fp32, whose tiles take twice the memory, and where an operand would be narrow."""
NARROW = 64
"""Triton's wgmma was seen to be wrong with operands of 16 and 32 columns: values are padded to this many."""


_HOPPERS_SHARED_BYTES = 227 * 1024


def has_hoppers_shared_memory(device: torch.device) -> bool:
    """Return whether a block may have 227 KiB of shared memory; also yes in Triton's interpreter."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= _HOPPERS_SHARED_BYTES


_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _masks(
    segment_ptr, r, k, r_at, k_at, last, start, PACKED: tl.constexpr, BACKWARD: tl.constexpr
):  # fmt: skip
    """Return which positions a row takes values from, [rows, L], and which rows have the state of the chunk's border."""
    seen = (k[None, :] >= r[:, None] if BACKWARD else k[None, :] <= r[:, None]) & (k[None, :] <= last)
    reached = r >= 0
    if PACKED:
        r_ids = tl.load(segment_ptr + r_at)
        seen = seen & (tl.load(segment_ptr + k_at)[None, :] == r_ids[:, None])
        border = tl.load(segment_ptr + last) if BACKWARD else tl.load(segment_ptr - 1, mask=start > 0, other=-1)
        reached = r_ids == border
    return seen, reached


@triton.jit
def _decays(decay_ptr, r, k, L: tl.constexpr, BACKWARD: tl.constexpr):
    """Return the decays between rows and the chunk's border, [rows], and between rows and positions, [rows, L]; 1 where
    rows do not take from positions."""
    decay_r, decay_k = tl.load(decay_ptr + r) * _LOG2_E, tl.load(decay_ptr + k) * _LOG2_E
    if BACKWARD:
        reach = tl.exp2(tl.minimum(tl.load(decay_ptr + L - 1) * _LOG2_E - decay_r, 0.0))
        between = decay_k[None, :] - decay_r[:, None]
    else:
        reach = tl.exp2(decay_r)
        between = decay_r[:, None] - decay_k[None, :]
    return reach, tl.exp2(tl.minimum(between, 0.0))


@triton.jit
def _scan(
    values_ptr, row_columns_ptr, columns_ptr, states_ptr, dt_ptr, decay_ptr, D_ptr, segment_ptr, out_ptr,
    length, num_chunks, stride_values_batch, stride_values, stride_row_columns_batch, stride_row_columns,
    stride_columns_batch, stride_columns, stride_out_batch, stride_out,
    HEADS: tl.constexpr, WALKED: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr,
    N: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Forward: rows i of out = y take values = x of positions j <= i and the state that enters the chunk; row columns =
    C, columns = B. Backward: rows j of out = gradients of x take values = gradients of y of positions i >= j and the
    gradient of the state that leaves the chunk; row columns = B, columns = C."""
    tile, batch_chunk, group = tl.program_id(0) % (L // ROWS), tl.program_id(1), tl.program_id(2)
    part = tl.program_id(0) // (L // ROWS)
    batch, chunk = batch_chunk // num_chunks, batch_chunk % num_chunks
    start = chunk * L
    r, k = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, L)
    n, p = tl.arange(0, N), tl.arange(0, PADDED)
    p_inside = p < P
    last = tl.minimum(L, length - start) - 1
    # Behind the end of the row its last position stands in: scores are zero there, and nothing is stored.
    r_at, k_at = tl.minimum(r, last), tl.minimum(k, last)
    row_columns_ptr += batch.to(tl.int64) * stride_row_columns_batch + start.to(tl.int64) * stride_row_columns
    columns_ptr += batch.to(tl.int64) * stride_columns_batch + start.to(tl.int64) * stride_columns
    row_columns = tl.load(row_columns_ptr + group * N + r_at[:, None] * stride_row_columns + n[None, :])
    columns = tl.load(columns_ptr + group * N + k_at[None, :] * stride_columns + n[:, None])
    segment_ptr += batch.to(tl.int64) * length + start
    seen, reached = _masks(segment_ptr, r, k, r_at, k_at, last, start, PACKED, BACKWARD)
    scores = tl.where(seen, tl.dot(row_columns, columns), 0.0)
    head = group * HEADS + part * WALKED
    values_ptr += batch.to(tl.int64) * stride_values_batch + start.to(tl.int64) * stride_values + head * P
    out_ptr += batch.to(tl.int64) * stride_out_batch + start.to(tl.int64) * stride_out + head * P
    states_ptr += (batch_chunk.to(tl.int64) * (GROUPS * HEADS) + head) * (P * N)
    row = ((batch * GROUPS * HEADS + head).to(tl.int64) * num_chunks + chunk) * L
    D_ptr += head
    for _ in range(WALKED):
        reach, between = _decays(decay_ptr + row, r, k, L, BACKWARD)
        if PACKED:
            reach = tl.where(reached, reach, 0.0)
        states = tl.load(states_ptr + p[None, :] * N + n[:, None], mask=p_inside[None, :], other=0.0)
        values = tl.load(values_ptr + k_at[:, None] * stride_values + p[None, :], mask=p_inside[None, :], other=0.0)
        dt, D = tl.load(dt_ptr + row + (r if BACKWARD else k)), tl.load(D_ptr)
        own = tl.load(values_ptr + r_at[:, None] * stride_values + p[None, :], mask=p_inside[None, :], other=0.0)
        total = tl.dot(row_columns, states)
        weights = scores * between
        if not BACKWARD:
            weights *= dt[None, :]
        total = tl.dot(weights.to(values.dtype), values, total * reach[:, None])
        if BACKWARD:
            total *= dt[:, None]
        total += own.to(tl.float32) * D
        tl.store(
            out_ptr + r[:, None] * stride_out + p[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=(r <= last)[:, None] & p_inside[None, :],
        )
        values_ptr += P
        out_ptr += P
        states_ptr += P * N
        row += num_chunks * L
        D_ptr += 1


def _launch_of(values: Tensor, size: int, padded: int, chunk: int) -> Launch:
    element_size = values.element_size()
    if element_size == 2 and NARROW <= size <= 128 and padded <= 128 and NARROW <= chunk <= 128:
        return LAUNCH if has_hoppers_shared_memory(values.device) else LEAN_LAUNCH
    wide = element_size * max(size, chunk) > 512  # bytes; two stages of these would not fit
    return SMALL_LAUNCH._replace(stages=1) if wide else SMALL_LAUNCH


def _run(
    values: Tensor, row_columns: Tensor, columns: Tensor, states: Tensor, dt: Tensor, decay: Tensor, D: Tensor,
    index: Tensor | None, out: Tensor, backward: bool, launch: Launch | None,
) -> None:  # fmt: skip
    batch, length, num_heads, head_dim = values.shape
    num_chunks, chunk = decay.shape[2:]
    groups, size = columns.shape[2:]
    padded = max(triton.next_power_of_2(head_dim), NARROW)
    launch = launch or _launch_of(values, size, padded, chunk)
    heads = num_heads // groups
    rows, walked = min(launch.rows, chunk), math.gcd(launch.heads, heads)
    _scan[(chunk // rows * (heads // walked), batch * num_chunks, groups)](
        values, row_columns, columns, states, dt, decay, D, decay if index is None else index, out,
        length, num_chunks, values.stride(0), values.stride(1), row_columns.stride(0), row_columns.stride(1),
        columns.stride(0), columns.stride(1), out.stride(0), out.stride(1),
        HEADS=heads, WALKED=walked, GROUPS=groups, P=head_dim, PADDED=padded, N=size, L=chunk, ROWS=rows,
        PACKED=index is not None, BACKWARD=backward, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def scan_outputs(
    x: Tensor, dt: Tensor, decay: Tensor, B: Tensor, C: Tensor, states: Tensor, D: Tensor, index: Tensor | None,
    launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """Return y, [B, S, H, P] in x's dtype, with the skip connection D.

    Args:
        x: [B, S, H, P]; heads and values contiguous.
        dt: [B, H, c, L] fp32, 0 behind the sequence's end.
        decay: [B, H, c, L] fp32, running sums of dt A within a chunk.
        B: [B, S, G, N]; groups and values contiguous, N a power of two.
        C: as B.
        states: [B, c, H, P, N], that enter chunks.
        D: [H] fp32.
        index: [B, S] int32, the number of each position's document within its row.
        launch: instead of the one for the sizes.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(x, C, B, states, dt, decay, D, index, y, False, launch)
    return y


def gradient_of_inputs(
    grad: Tensor, dt: Tensor, decay: Tensor, B: Tensor, C: Tensor, grad_states: Tensor, D: Tensor, index: Tensor | None,
    out: Tensor, launch: Launch | None = None,
) -> None:  # fmt: skip
    """Write the gradient of x, also through the skip connection D, into `out`.

    Args:
        grad: [B, S, H, P] of the scan's output; heads and values contiguous.
        dt: as for `scan_outputs`, like decay, B, C, D and index.
        decay: as there.
        B: as there.
        C: as there.
        grad_states: [B, c, H, P, N], of the states that leave chunks.
        D: as there.
        index: as there.
        out: [B, S, H, P]; heads and values contiguous.
        launch: as there.
    """
    _run(grad, B, C, grad_states, dt, decay, D, index, out, True, launch)
