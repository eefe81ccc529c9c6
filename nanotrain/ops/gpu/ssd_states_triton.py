"""The states of the scan at the borders of chunks, and their gradients: one kernel each way, a program a head and part of N.

A program walks the chunks of its head with the state in registers, so what a chunk adds is never written and read again
(mamba-ssm does that in fp32, in two kernels).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PART = 64
"""Columns of the state in a program: two programs a head at the published 128, both on one processor (99 KB each)."""


@triton.jit
def _walk(
    values_ptr, columns_ptr, dt_ptr, decay_ptr, segment_ptr, entering_ptr, out_ptr, chunk_decay_ptr,
    length, num_chunks, stride_values_batch, stride_values, stride_columns_batch, stride_columns,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr,
    PART: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Forward: values = x, columns = B, out = states that enter chunks. Backward: values = gradients of y, columns = C,
    out = gradients of the states that leave chunks, chunk_decay = gradient by each chunk's decay (parts over N)."""
    head, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p, n, l = tl.arange(0, PADDED), part * PART + tl.arange(0, PART), tl.arange(0, L)  # noqa: E741
    inside = p < P
    values_ptr += batch.to(tl.int64) * stride_values_batch + head * P
    columns_ptr += batch.to(tl.int64) * stride_columns_batch + (head // (HEADS // GROUPS)) * N
    row = (batch * HEADS + head).to(tl.int64) * num_chunks
    at = p[:, None] * N + n[None, :]
    state = tl.zeros((PADDED, PART), dtype=tl.float32)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if BACKWARD else step
        here = ((batch * num_chunks + chunk).to(tl.int64) * HEADS + head) * P * N
        tl.store(out_ptr + here + at, state.to(out_ptr.dtype.element_ty), mask=inside[:, None])
        start = chunk * L
        present = start + l < length
        decay = tl.load(decay_ptr + (row + chunk) * L + l)
        whole = tl.load(decay_ptr + (row + chunk) * L + L - 1)  # of the chunk; behind the end of the row nothing decays
        if BACKWARD:
            weight = tl.exp(decay)
        else:
            weight = tl.exp(tl.minimum(whole - decay, 0.0)) * tl.load(dt_ptr + (row + chunk) * L + l)
        kept = tl.exp(whole)
        if PACKED:
            ids = segment_ptr + batch.to(tl.int64) * length
            own = tl.load(ids + start + l, mask=present, other=-1)
            last = tl.load(ids + tl.minimum(start + L, length) - 1)
            before = tl.load(ids + start - 1, mask=start > 0, other=-2)
            weight = tl.where(own == (before if BACKWARD else last), weight, 0.0)
            kept = tl.where(before == last, kept, 0.0)
        if BACKWARD:
            entering = tl.load(entering_ptr + here + at, mask=inside[:, None], other=0.0).to(tl.float32)
            tl.store(chunk_decay_ptr + (row + chunk) * (N // PART) + part, tl.sum(entering * state) * kept)
        position = (start + l).to(tl.int64)
        values = tl.load(
            values_ptr + position[None, :] * stride_values + p[:, None],
            mask=present[None, :] & inside[:, None],
            other=0.0,
        )
        columns = tl.load(
            columns_ptr + position[:, None] * stride_columns + n[None, :], mask=present[:, None], other=0.0
        )
        weighted = (columns.to(tl.float32) * weight[:, None]).to(values.dtype)
        state = tl.dot(values, weighted, state * kept)


def _launch(
    values: Tensor, columns: Tensor, dt: Tensor, decay: Tensor, index: Tensor | None, entering: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, heads, head_dim = values.shape
    chunks, chunk = decay.shape[2:]
    size = columns.shape[3]
    part = min(_PART, size)
    out = torch.empty(batch, chunks, heads, head_dim, size, dtype=values.dtype, device=values.device)
    by_decay = torch.empty(batch, heads, chunks, size // part, dtype=torch.float32, device=values.device)
    _walk[(heads, size // part, batch)](
        values, columns, dt, decay, decay if index is None else index, out if entering is None else entering, out, by_decay,
        length, chunks, values.stride(0), values.stride(1), columns.stride(0), columns.stride(1),
        HEADS=heads, GROUPS=columns.shape[2], P=head_dim, PADDED=max(triton.next_power_of_2(head_dim), 16), N=size,
        PART=part, L=chunk, PACKED=index is not None, BACKWARD=entering is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, by_decay


def states_before_chunks(x: Tensor, dt: Tensor, decay: Tensor, B: Tensor, index: Tensor | None) -> Tensor:
    """Return the state that enters each chunk, [B, c, H, P, N] in x's dtype; that of the first is zero.

    Args:
        x: [B, S, H, P]; heads and values contiguous.
        dt: [B, H, c, L] fp32, 0 behind the sequence's end.
        decay: [B, H, c, L] fp32, running sums of dt A within a chunk.
        B: [B, S, G, N]; groups and values contiguous, N a power of two.
        index: [B, S] int32, the number of each position's document within its row.
    """
    return _launch(x, B, dt, decay, index, None)[0]


def gradients_of_states(
    grad: Tensor, decay: Tensor, C: Tensor, states: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the states that leave chunks and of each chunk's decay, through all later chunks.

    Args:
        grad: [B, S, H, P] of the scan's output; heads and values contiguous.
        decay: [B, H, c, L] fp32, running sums of dt A within a chunk.
        C: [B, S, G, N]; groups and values contiguous, N a power of two.
        states: [B, c, H, P, N], of `states_before_chunks`.
        index: as there.

    Returns:
        [B, c, H, P, N] in grad's dtype, zero for the last chunk, and [B, H, c] fp32.
    """
    gradients, by_decay = _launch(grad, C, decay, decay, index, states)
    return gradients, by_decay.sum(3)
