"""The part of the scan's gradient that comes from pairs of positions within a chunk: for B, C, the decays, dt and D at once.

mamba-ssm makes the products of output gradients and inputs twice, and reads both once more for dt and D.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotrain.ops.gpu.head_tiles import can_be_copied, head_tiles


class Launch(NamedTuple):
    """How the work is cut: the length of tiles of pairs, warps, stages of loads and the most registers of a thread.

    With `copied` Hopper's copy engine brings x and gradients (TMA).
    """

    tile: int
    warps: int
    stages: int
    registers: int | None
    copied: bool


LAUNCH = Launch(tile=64, warps=4, stages=3, registers=None, copied=False)
COPIED_LAUNCH = LAUNCH._replace(copied=True)
"""Where the copy engine can be used."""
_BLOCK = 16
"""Heads whose sums a program keeps in registers at most."""


class PairGradients(NamedTuple):
    """What `pair_gradients` returns.

    scores: [B, c, G, L, L] in x's dtype, zero above the diagonal.
    parts: [B, H, c, 2 T + 1, L] fp32 of T tiles along L, of the products of scores and their gradients per head. First T,
        by the tile of the earlier position: sums over earlier positions, with their dt. Then T, by the tile of the later
        position: sums over later ones, without dt. At last each position with itself, without dt. A sum that no
        pair of tiles has is not written.
    own: [B, H, c, L] fp32, products of each position's x and output gradient.
    """

    scores: Tensor
    parts: Tensor
    own: Tensor


_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _factors(
    x_ptr, grad_ptr, i, j, i_inside, j_inside, later, earlier, batch, head, start, stride_x, stride_grad,
    P: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """Return a head's gradients of the later positions, [TILE, PADDED], and its x of the earlier ones, [PADDED, TILE]."""
    if COPIED:  # the pointers are descriptors
        grad = grad_ptr.load([batch, head, start + later * TILE, 0]).reshape(TILE, PADDED)
        x = x_ptr.load([batch, head, start + earlier * TILE, 0]).reshape(TILE, PADDED).trans(1, 0)
    else:
        p = tl.arange(0, PADDED)
        grad_at, x_at = i[:, None] * stride_grad + p[None, :], j[None, :] * stride_x + p[:, None]
        grad = tl.load(grad_ptr + head * P + grad_at, mask=i_inside[:, None] & (p < P)[None, :], other=0.0)
        x = tl.load(x_ptr + head * P + x_at, mask=j_inside[None, :] & (p < P)[:, None], other=0.0)
    return grad, x


@triton.jit
def _heads(
    x_ptr, grad_ptr, dt_ptr, decay_ptr, parts_ptr, own_ptr, scores, i, j, i_inside, j_inside, later, earlier,
    batch, first, start, row_at, num_chunks, stride_x, stride_grad,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, L: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, COPIED: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Walk the heads of a group, whose first is given; return the sum of the gradients by a tile of scores.

    The sums of a block of heads stay in registers, those over rows for each 16 of them: so that within a block no warp
    waits for another's sums.
    """
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    number = tl.arange(0, BLOCK)
    if DIAGONAL:
        own_scores = tl.sum(tl.where(i[:, None] == j[None, :], scores, 0.0), axis=1)
        scores = tl.where(i[:, None] > j[None, :], scores, 0.0)
    for block in range(0, HEADS, BLOCK):
        over_j, own = tl.zeros((TILE, BLOCK), dtype=tl.float32), tl.zeros((TILE, BLOCK), dtype=tl.float32)
        over_i = tl.zeros((TILE // 16, BLOCK, TILE), dtype=tl.float32)
        heads = tl.minimum(HEADS - block, BLOCK)
        for head in tl.range(heads, num_stages=STAGES):  # so that decays and dt are loaded ahead too
            grad, x = _factors(
                x_ptr, grad_ptr, i, j, i_inside, j_inside, later, earlier, batch, first + block + head, start,
                stride_x, stride_grad, P, PADDED, TILE, COPIED,
            )  # fmt: skip
            row = row_at + (block + head) * num_chunks * L
            decay_i, decay_j = tl.load(decay_ptr + row + i) * _LOG2_E, tl.load(decay_ptr + row + j) * _LOG2_E
            dt = tl.load(dt_ptr + row + j)
            product = tl.dot(grad, x)
            if DIAGONAL:
                of_own = tl.sum(tl.where(i[:, None] == j[None, :], product, 0.0), axis=1)
                own = tl.where(number[None, :] == head, of_own[:, None], own)
                product *= tl.exp2(tl.minimum(decay_i[:, None] - decay_j[None, :], 0.0))
            else:  # two factors of at most 1, with the last position of the earlier tile between them
                between = tl.load(decay_ptr + row + earlier * TILE + TILE - 1) * _LOG2_E
                product *= tl.exp2(tl.minimum(decay_i - between, 0.0))[:, None]
                product *= tl.exp2(tl.minimum(between - decay_j, 0.0))[None, :]
            scored = product * scores
            of_i = tl.sum(scored.reshape(TILE // 16, 16, TILE), axis=1)
            over_i = tl.where(number[None, :, None] == head, of_i[:, None, :], over_i)
            of_j = tl.sum(scored * dt[None, :], axis=1)
            over_j = tl.where(number[None, :] == head, of_j[:, None], over_j)
            total += product * dt[None, :]
        rows = row_at + (block + number.to(tl.int64)) * num_chunks * L
        inside, parts = number < heads, parts_ptr + rows * (2 * TILES + 1)
        tl.store(parts[None, :] + earlier * L + i[:, None], over_j, mask=inside[None, :])
        over_i = tl.sum(over_i, axis=0)
        tl.store(parts[:, None] + (TILES + later) * L + j[None, :], over_i, mask=inside[:, None])
        if DIAGONAL:
            tl.store(own_ptr + rows[None, :] + i[:, None], own, mask=inside[None, :])
            tl.store(parts[None, :] + 2 * TILES * L + i[:, None], own * own_scores[:, None], mask=inside[None, :])
    return total


@triton.jit
def _pairs(
    x_ptr, grad_ptr, dt_ptr, decay_ptr, scores_ptr, segment_ptr, grad_scores_ptr, parts_ptr, own_ptr,
    length, num_chunks, stride_x_batch, stride_x, stride_grad_batch, stride_grad,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, L: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    pair, batch_chunk, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, chunk = batch_chunk // num_chunks, batch_chunk % num_chunks
    later = 0  # pairs of tiles are counted row by row of the lower triangle
    for row in tl.static_range(1, TILES):
        later += (pair >= row * (row + 1) // 2).to(tl.int32)
    earlier = pair - later * (later + 1) // 2
    i, j = later * TILE + tl.arange(0, TILE), earlier * TILE + tl.arange(0, TILE)
    start, first = chunk * L, group * HEADS
    i_inside, j_inside = start + i < length, start + j < length
    matrix = (batch_chunk.to(tl.int64) * GROUPS + group) * L * L
    scores = tl.load(scores_ptr + matrix + i[:, None] * L + j[None, :])  # 0 across documents
    if not COPIED:
        x_ptr += batch.to(tl.int64) * stride_x_batch + start.to(tl.int64) * stride_x
        grad_ptr += batch.to(tl.int64) * stride_grad_batch + start.to(tl.int64) * stride_grad
    row_at = ((batch * GROUPS + group).to(tl.int64) * HEADS * num_chunks + chunk) * L
    if later == earlier:
        total = _heads(
            x_ptr, grad_ptr, dt_ptr, decay_ptr, parts_ptr, own_ptr, scores, i, j, i_inside, j_inside, later, earlier,
            batch, first, start, row_at, num_chunks, stride_x, stride_grad,
            HEADS, BLOCK, P, PADDED, L, TILE, TILES, STAGES, COPIED, True,
        )  # fmt: skip
    else:
        total = _heads(
            x_ptr, grad_ptr, dt_ptr, decay_ptr, parts_ptr, own_ptr, scores, i, j, i_inside, j_inside, later, earlier,
            batch, first, start, row_at, num_chunks, stride_x, stride_grad,
            HEADS, BLOCK, P, PADDED, L, TILE, TILES, STAGES, COPIED, False,
        )  # fmt: skip
    seen = i[:, None] >= j[None, :]
    if PACKED:
        ids = segment_ptr + batch.to(tl.int64) * length + start
        same = tl.load(ids + i, mask=i_inside, other=-1)[:, None] == tl.load(ids + j, mask=j_inside, other=-2)[None, :]
        seen = seen & same
    kind = grad_scores_ptr.dtype.element_ty
    tl.store(grad_scores_ptr + matrix + i[:, None] * L + j[None, :], tl.where(seen, total, 0.0).to(kind))
    if later != earlier:
        tl.store(grad_scores_ptr + matrix + j[:, None] * L + i[None, :], tl.zeros((TILE, TILE), dtype=kind))


def pair_gradients(
    x: Tensor, grad: Tensor, dt: Tensor, decay: Tensor, scores: Tensor, segment_index: Tensor | None,
    launch: Launch | None = None,
) -> PairGradients:  # fmt: skip
    """Return the gradient by the scores, and sums of which `ssd_decays_triton` makes those of the decays and dt.

    Args:
        x: [B, S, H, P]; heads and values contiguous.
        grad: [B, S, H, P] of the scan's output; heads and values contiguous.
        dt: [B, H, c, L] fp32, 0 behind the sequence's end.
        decay: [B, H, c, L] fp32, running sums of dt A within a chunk.
        scores: [B, c, G, L, L] fp32, C_i . B_j, 0 across documents.
        segment_index: [B, S] int32.
        launch: instead of the one for the sizes.
    """
    batch, num_heads, num_chunks, chunk = dt.shape
    launch = launch or (COPIED_LAUNCH if can_be_copied(chunk, x, grad) else LAUNCH)
    groups, head_dim = scores.shape[2], x.shape[3]
    tile = min(launch.tile, chunk)
    tiles = chunk // tile
    grad_scores = torch.empty(scores.shape, dtype=x.dtype, device=x.device)
    parts = torch.empty(batch, num_heads, num_chunks, 2 * tiles + 1, chunk, dtype=torch.float32, device=x.device)
    own = torch.empty(dt.shape, dtype=torch.float32, device=x.device)
    padded = max(triton.next_power_of_2(head_dim), 16)
    values = [head_tiles(t, tile, padded) if launch.copied else t for t in (x, grad)]
    _pairs[(tiles * (tiles + 1) // 2, batch * num_chunks, groups)](
        *values, dt, decay, scores, scores if segment_index is None else segment_index, grad_scores, parts, own,
        x.shape[1], num_chunks, x.stride(0), x.stride(1), grad.stride(0), grad.stride(1),
        HEADS=num_heads // groups, BLOCK=min(triton.next_power_of_2(num_heads // groups), _BLOCK), GROUPS=groups,
        P=head_dim, PADDED=padded, L=chunk, TILE=tile, TILES=tiles, PACKED=segment_index is not None, STAGES=launch.stages,
        COPIED=launch.copied, num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip
    return PairGradients(grad_scores, parts, own)
