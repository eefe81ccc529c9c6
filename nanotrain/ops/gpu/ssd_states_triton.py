"""The states of the scan at the borders of chunks, and their gradients: one kernel each way, a program a head and part of N.

A program walks the chunks of its head with the state in registers, so what a chunk adds is never written and read again
(mamba-ssm does that in fp32, in two kernels).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanotrain.ops.gpu.head_tiles import can_be_copied, head_tiles


class Launch(NamedTuple):
    """How the work is cut: columns of the state in a program, positions of a chunk in a step, warps and stages of loads.

    With `copied` Hopper's copy engine moves tiles (TMA).
    """

    part: int
    rows: int
    warps: int
    stages: int
    copied: bool


LAUNCH = Launch(part=64, rows=128, warps=4, stages=2, copied=False)
"""Two programs a head at the published 128, both on one processor (99 KB each)."""
COPIED_LAUNCH = Launch(part=64, rows=64, warps=4, stages=3, copied=True)
"""Where the copy engine can be used: two programs on a processor too (91 KB each), and loads a chunk ahead."""


_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _border(
    decay_ptr, segment_ptr, row, batch, step, length, num_chunks,
    L: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Return the decay of the chunk of a step as a power of 2, and the documents of its last position and of the one before the chunk."""
    chunk = tl.minimum(step // (L // ROWS), num_chunks - 1)
    if BACKWARD:
        chunk = num_chunks - 1 - chunk
    whole = tl.load(decay_ptr + (row + chunk) * L + L - 1) * _LOG2_E  # behind the end of the row nothing decays
    last, before = 0, 0
    if PACKED:
        ids = segment_ptr + batch.to(tl.int64) * length
        last = tl.load(ids + tl.minimum(chunk * L + L, length) - 1)
        before = tl.load(ids + chunk * L - 1, mask=chunk > 0, other=-2)
    return whole, last, before


@triton.jit
def _tiles(
    values, columns, batch, head, group, part, start, length, stride_values_batch, stride_values, stride_columns_batch,
    stride_columns, P: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    COPIED: tl.constexpr,
):  # fmt: skip
    """Return the values of a head, [PADDED, ROWS], and a part of the columns of its group, [ROWS, PART], from a position on;
    0 behind the end of the row."""
    if COPIED:
        of_head = values.load([batch, head, start, 0]).reshape(ROWS, PADDED).trans(1, 0)
        of_group = columns.load([batch, group, start, part * PART]).reshape(ROWS, PART)
    else:
        p, n, at = tl.arange(0, PADDED), part * PART + tl.arange(0, PART), start + tl.arange(0, ROWS)
        present, at = at < length, at.to(tl.int64)
        values += batch.to(tl.int64) * stride_values_batch + head * P
        columns += batch.to(tl.int64) * stride_columns_batch + group * N
        inside = (p < P)[:, None] & present[None, :]
        of_head = tl.load(values + at[None, :] * stride_values + p[:, None], mask=inside, other=0.0)
        of_group = tl.load(columns + at[:, None] * stride_columns + n[None, :], mask=present[:, None], other=0.0)
    return of_head, of_group


@triton.jit
def _walk(
    values, columns, out, entering_ptr, dt_ptr, decay_ptr, segment_ptr, chunk_decay_ptr,
    length, num_chunks, stride_values_batch, stride_values, stride_columns_batch, stride_columns,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, PART: tl.constexpr,
    L: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """Forward: values = x, columns = B, out = states that enter chunks. Backward: values = gradients of y, columns = C,
    out = gradients of the states that leave chunks, chunk_decay = gradient by each chunk's decay (parts over N).

    If COPIED, values, columns and out are descriptors: of [B, H, S, P] with blocks [1, 1, ROWS, PADDED], [B, G, S, N] with
    [1, 1, ROWS, PART] and [B c H, P, N] with [1, PADDED, PART].
    """
    head, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = head // (HEADS // GROUPS)
    p, n, r = tl.arange(0, PADDED), part * PART + tl.arange(0, PART), tl.arange(0, ROWS)
    row = (batch * HEADS + head).to(tl.int64) * num_chunks
    at, inside = p[:, None] * N + n[None, :], (p < P)[:, None]
    state = tl.zeros((PADDED, PART), dtype=tl.float32)
    if BACKWARD:  # in registers a chunk ahead, like the border
        entering_ptr += ((batch * num_chunks + num_chunks - 1).to(tl.int64) * HEADS + head) * (P * N)
        entering = tl.load(entering_ptr + at, mask=inside, other=0.0)
    whole, last, before = _border(decay_ptr, segment_ptr, row, batch, 0, length, num_chunks, L, ROWS, PACKED, BACKWARD)
    for step in range(num_chunks * (L // ROWS)):
        chunk = num_chunks - 1 - step // (L // ROWS) if BACKWARD else step // (L // ROWS)
        first = step % (L // ROWS) * ROWS
        decay = tl.load(decay_ptr + (row + chunk) * L + first + r) * _LOG2_E
        if BACKWARD:
            weight = tl.exp2(decay)
        else:
            dt = tl.load(dt_ptr + (row + chunk) * L + first + r)
            weight = tl.exp2(tl.minimum(whole - decay, 0.0)) * dt
        start = chunk * L + first
        kept = tl.exp2(whole)
        if PACKED:
            own = tl.load(segment_ptr + batch.to(tl.int64) * length + start + r, mask=start + r < length, other=-1)
            weight = tl.where(own == (before if BACKWARD else last), weight, 0.0)
            kept = tl.where(before == last, kept, 0.0)
        if first == 0:
            here = (batch * num_chunks + chunk) * HEADS + head
            if COPIED:
                out.store([here, 0, part * PART], state.to(out.dtype).reshape(1, PADDED, PART))
            else:
                tl.store(out + here.to(tl.int64) * (P * N) + at, state.to(out.dtype.element_ty), mask=inside)
            if BACKWARD:
                product = tl.sum(entering.to(tl.float32) * state)
                tl.store(chunk_decay_ptr + (row + chunk) * (N // PART) + part, product * kept)
                entering_ptr -= HEADS * P * N
                entering = tl.load(entering_ptr + at, mask=inside & (chunk > 0), other=0.0)
            state *= kept
        whole, last, before = _border(
            decay_ptr, segment_ptr, row, batch, step + 1, length, num_chunks, L, ROWS, PACKED, BACKWARD
        )
        of_head, of_group = _tiles(
            values, columns, batch, head, group, part, start, length, stride_values_batch, stride_values,
            stride_columns_batch, stride_columns, P, PADDED, N, PART, ROWS, COPIED,
        )  # fmt: skip
        weighted = (of_group.to(tl.float32) * weight[:, None]).to(of_head.dtype)
        state = tl.dot(of_head, weighted, state)


def _launch(
    values: Tensor, columns: Tensor, dt: Tensor, decay: Tensor, index: Tensor | None, entering: Tensor | None,
    launch: Launch | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, length, heads, head_dim = values.shape
    chunks, chunk = decay.shape[2:]
    launch = launch or LAUNCH
    size = columns.shape[3]
    part, rows = min(launch.part, size), min(launch.rows, chunk)
    padded = max(triton.next_power_of_2(head_dim), 16)
    out = torch.empty(batch, chunks, heads, head_dim, size, dtype=values.dtype, device=values.device)
    by_decay = torch.empty(batch, heads, chunks, size // part, dtype=torch.float32, device=values.device)
    if launch.copied:
        flat = out.view(batch * chunks * heads, head_dim, size)
        tiles = head_tiles(values, rows, padded), head_tiles(columns, rows, part)
        tiles = *tiles, TensorDescriptor.from_tensor(flat, [1, padded, part])
    else:
        tiles = values, columns, out
    _walk[(heads, size // part, batch)](
        *tiles, out if entering is None else entering, dt, decay, decay if index is None else index, by_decay,
        length, chunks, values.stride(0), values.stride(1), columns.stride(0), columns.stride(1),
        HEADS=heads, GROUPS=columns.shape[2], P=head_dim, PADDED=padded, N=size, PART=part, L=chunk, ROWS=rows,
        PACKED=index is not None, BACKWARD=entering is not None, COPIED=launch.copied,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out, by_decay


def states_before_chunks(
    x: Tensor, dt: Tensor, decay: Tensor, B: Tensor, index: Tensor | None, launch: Launch | None = None
) -> Tensor:
    """Return the state that enters each chunk, [B, c, H, P, N] in x's dtype; that of the first is zero.

    Args:
        x: [B, S, H, P]; heads and values contiguous.
        dt: [B, H, c, L] fp32, 0 behind the sequence's end.
        decay: [B, H, c, L] fp32, running sums of dt A within a chunk.
        B: [B, S, G, N]; groups and values contiguous, N a power of two.
        index: [B, S] int32, the number of each position's document within its row.
        launch: instead of the one for the sizes.
    """
    return _launch(x, B, dt, decay, index, None, launch)[0]


def gradients_of_states(
    grad: Tensor, decay: Tensor, C: Tensor, states: Tensor, index: Tensor | None, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the states that leave chunks and of each chunk's decay, through all later chunks.

    Args:
        grad: [B, S, H, P] of the scan's output; heads and values contiguous.
        decay: [B, H, c, L] fp32, running sums of dt A within a chunk.
        C: [B, S, G, N]; groups and values contiguous, N a power of two.
        states: [B, c, H, P, N], of `states_before_chunks`.
        index: as there.
        launch: as there.

    Returns:
        [B, c, H, P, N] in grad's dtype, zero for the last chunk, and [B, H, c] fp32.
    """
    gradients, by_decay = _launch(grad, C, decay, decay, index, states, launch)
    return gradients, by_decay.sum(3)
