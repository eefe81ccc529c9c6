"""What the gradients of B and C take from the states, summed over the heads of a group within one program.

mamba-ssm has a kernel for either and multiplies the same sums of the decays in; here dt stays outside of them, so that
they also serve the gradient of dt.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotrain.ops.gpu.ssd_scan_triton import NARROW, has_hoppers_shared_memory


class Launch(NamedTuple):
    """How the work is cut: rows of a chunk and columns of the state in a program, warps and stages of loads."""

    rows: int
    columns: int
    warps: int
    stages: int


LAUNCH = Launch(rows=128, columns=128, warps=8, stages=3)
"""For 2-byte numbers, where a block may have all of Hopper's shared memory; the fastest of five."""
LEAN_LAUNCH = Launch(rows=64, columns=64, warps=4, stages=2)
"""The same on other GPUs: 66 KB."""
SMALL_LAUNCH = Launch(rows=32, columns=64, warps=4, stages=1)
"""For fp32, whose tiles take twice the memory, and where an operand would be narrow."""


@triton.jit
def _columns(
    values_ptr, columns_ptr, states_ptr, dt_ptr, decay_ptr, segment_ptr, out_ptr, parts_ptr,
    length, num_chunks, stride_values_batch, stride_values, stride_columns_batch, stride_columns,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr,
    PART: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, OF_C: tl.constexpr,
):  # fmt: skip
    """Of B: values = x, states = gradients of the states that leave chunks. Of C: values = gradients of y, states = those
    that enter."""
    tile, part = tl.program_id(0) // (N // PART), tl.program_id(0) % (N // PART)
    batch_chunk, group = tl.program_id(1), tl.program_id(2)
    batch, chunk = batch_chunk // num_chunks, batch_chunk % num_chunks
    start = chunk * L
    l, n, p = tile * ROWS + tl.arange(0, ROWS), part * PART + tl.arange(0, PART), tl.arange(0, PADDED)  # noqa: E741
    p_inside = p < P
    last = tl.minimum(L, length - start) - 1
    row = tl.minimum(l, last)  # behind the end of the row its last position stands in, and nothing is stored
    if PACKED:
        ids = segment_ptr + batch.to(tl.int64) * length + start
        border = tl.load(ids - 1, mask=start > 0, other=-1) if OF_C else tl.load(ids + last)
        reached = tl.load(ids + row) == border
    columns_ptr += batch.to(tl.int64) * stride_columns_batch + start.to(tl.int64) * stride_columns + group * N
    columns = tl.load(columns_ptr + row[:, None] * stride_columns + n[None, :])
    head = group * HEADS
    values_ptr += batch.to(tl.int64) * stride_values_batch + start.to(tl.int64) * stride_values + head * P
    states_ptr += (batch_chunk.to(tl.int64) * (GROUPS * HEADS) + head) * (P * N)
    at = ((batch * GROUPS * HEADS + head).to(tl.int64) * num_chunks + chunk) * L
    dt_ptr += at
    decay_ptr += at
    parts_ptr += at * (N // PART) + part * L
    total = tl.zeros((ROWS, PART), dtype=tl.float32)
    for _ in range(HEADS):
        decay, dt = tl.load(decay_ptr + l), tl.load(dt_ptr + l)
        reach = tl.exp(decay) if OF_C else tl.exp(tl.minimum(tl.load(decay_ptr + L - 1) - decay, 0.0))
        if PACKED:
            reach = tl.where(reached, reach, 0.0)
        values = tl.load(values_ptr + row[:, None] * stride_values + p[None, :], mask=p_inside[None, :], other=0.0)
        states = tl.load(states_ptr + p[:, None] * N + n[None, :], mask=p_inside[:, None], other=0.0)
        product = tl.dot(values, states) * reach[:, None]
        tl.store(parts_ptr + l, tl.where(l <= last, tl.sum(product * columns.to(tl.float32), axis=1), 0.0))
        if OF_C:
            total += product
        else:
            total += product * dt[:, None]
        values_ptr += P
        states_ptr += P * N
        dt_ptr += num_chunks * L
        decay_ptr += num_chunks * L
        parts_ptr += num_chunks * L * (N // PART)
    out_ptr += ((batch.to(tl.int64) * length + start) * GROUPS + group) * N
    tl.store(out_ptr + l[:, None] * (GROUPS * N) + n[None, :], total, mask=(l <= last)[:, None])


def _sums(
    values: Tensor, columns: Tensor, states: Tensor, dt: Tensor, decay: Tensor, index: Tensor | None, of_c: bool,
    launch: Launch | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, length, heads, head_dim = values.shape
    num_chunks, chunk = decay.shape[2:]
    groups, size = columns.shape[2:]
    if launch is None:
        fits = values.element_size() == 2 and size >= NARROW and head_dim <= 128 and chunk >= NARROW
        large = LAUNCH if has_hoppers_shared_memory(values.device) else LEAN_LAUNCH
        launch = large if fits else SMALL_LAUNCH
    rows, part = min(launch.rows, chunk), min(launch.columns, size)
    out = torch.empty(batch, length, groups, size, dtype=torch.float32, device=values.device)
    parts = torch.empty(batch, heads, num_chunks, size // part, chunk, dtype=torch.float32, device=values.device)
    _columns[(chunk // rows * (size // part), batch * num_chunks, groups)](
        values, columns, states, dt, decay, decay if index is None else index, out, parts,
        length, num_chunks, values.stride(0), values.stride(1), columns.stride(0), columns.stride(1),
        HEADS=heads // groups, GROUPS=groups, P=head_dim, PADDED=max(triton.next_power_of_2(head_dim), NARROW), N=size,
        PART=part, L=chunk, ROWS=rows, PACKED=index is not None, OF_C=of_c,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out, parts


def gradient_of_B(
    x: Tensor, B: Tensor, grad_states: Tensor, dt: Tensor, decay: Tensor, index: Tensor | None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return B's gradient through the states that leave chunks, and how much of it each head's positions have.

    Args:
        x: [B, S, H, P]; heads and values contiguous.
        B: [B, S, G, N]; groups and values contiguous, N a power of two.
        grad_states: [B, c, H, P, N], of the states that leave chunks.
        dt: [B, H, c, L] fp32.
        decay: [B, H, c, L] fp32, running sums of dt A within a chunk.
        index: [B, S] int32, the number of each position's document within its row.
        launch: instead of the one for the sizes.

    Returns:
        [B, S, G, N] fp32, and [B, H, c, parts of N, L] fp32: B times its gradient per head, without the factor dt.
    """
    return _sums(x, B, grad_states, dt, decay, index, False, launch)


def gradient_of_C(
    grad: Tensor, C: Tensor, states: Tensor, decay: Tensor, index: Tensor | None, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """Return C's gradient through the states that enter chunks, and C times it for each head's positions.

    Args:
        grad: [B, S, H, P] of the scan's output; heads and values contiguous.
        C: [B, S, G, N]; groups and values contiguous, N a power of two.
        states: [B, c, H, P, N], that enter chunks.
        decay: [B, H, c, L] fp32, running sums of dt A within a chunk.
        index: [B, S] int32, the number of each position's document within its row.
        launch: instead of the one for the sizes.

    Returns:
        [B, S, G, N] fp32, and [B, H, c, parts of N, L] fp32.
    """
    return _sums(grad, C, states, decay, decay, index, True, launch)
