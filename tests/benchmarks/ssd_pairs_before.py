"""The part of the scan's gradient that comes from pairs of positions within a chunk: for B, C, the decays, dt and D at once.

mamba-ssm makes the products of output gradients and inputs twice, and reads both once more for dt and D.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64


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


@triton.jit
def _pairs(
    x_ptr, grad_ptr, dt_ptr, decay_ptr, scores_ptr, segment_ptr, grad_scores_ptr, parts_ptr, own_ptr,
    length, num_chunks, stride_x_batch, stride_x, stride_grad_batch, stride_grad,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, L: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    pair, batch_chunk, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, chunk = batch_chunk // num_chunks, batch_chunk % num_chunks
    later = 0  # pairs of tiles are counted row by row of the lower triangle
    for row in tl.static_range(1, TILES):
        later += (pair >= row * (row + 1) // 2).to(tl.int32)
    earlier = pair - later * (later + 1) // 2
    i, j = later * TILE + tl.arange(0, TILE), earlier * TILE + tl.arange(0, TILE)
    p = tl.arange(0, PADDED)
    start = chunk * L
    i_inside, j_inside = start + i < length, start + j < length
    seen = i[:, None] >= j[None, :]
    if PACKED:
        ids = segment_ptr + batch.to(tl.int64) * length + start
        same = tl.load(ids + i, mask=i_inside, other=-1)[:, None] == tl.load(ids + j, mask=j_inside, other=-2)[None, :]
        seen = seen & same
    matrix = (batch_chunk.to(tl.int64) * GROUPS + group) * L * L
    scores = tl.load(scores_ptr + matrix + i[:, None] * L + j[None, :])  # 0 across documents
    diagonal = (i[:, None] == j[None, :]).to(tl.float32)
    own_scores = tl.sum(scores * diagonal, axis=1)
    scores = tl.where(i[:, None] > j[None, :], scores, 0.0)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    x_ptr += batch.to(tl.int64) * stride_x_batch + start.to(tl.int64) * stride_x + group * HEADS * P
    grad_ptr += batch.to(tl.int64) * stride_grad_batch + start.to(tl.int64) * stride_grad + group * HEADS * P
    row_at = ((batch * GROUPS + group).to(tl.int64) * HEADS * num_chunks + chunk) * L
    for _ in range(HEADS):
        grad = tl.load(
            grad_ptr + i[:, None] * stride_grad + p[None, :], mask=i_inside[:, None] & (p[None, :] < P), other=0.0
        )
        x = tl.load(x_ptr + j[None, :] * stride_x + p[:, None], mask=j_inside[None, :] & (p[:, None] < P), other=0.0)
        decay_i, decay_j = tl.load(decay_ptr + row_at + i), tl.load(decay_ptr + row_at + j)
        dt = tl.load(dt_ptr + row_at + j)
        product = tl.dot(grad, x)
        parts = parts_ptr + row_at * (2 * TILES + 1)
        if later == earlier:
            own = tl.sum(product * diagonal, axis=1)
            tl.store(own_ptr + row_at + i, own)
            tl.store(parts + 2 * TILES * L + i, own * own_scores)
        product *= tl.exp(tl.minimum(decay_i[:, None] - decay_j[None, :], 0.0))
        tl.store(parts + (TILES + later) * L + j, tl.sum(product * scores, axis=0))
        product *= dt[None, :]
        tl.store(parts + earlier * L + i, tl.sum(product * scores, axis=1))
        total += product
        x_ptr += P
        grad_ptr += P
        row_at += num_chunks * L
    kind = grad_scores_ptr.dtype.element_ty
    tl.store(grad_scores_ptr + matrix + i[:, None] * L + j[None, :], tl.where(seen, total, 0.0).to(kind))
    if later != earlier:
        tl.store(grad_scores_ptr + matrix + j[:, None] * L + i[None, :], tl.zeros((TILE, TILE), dtype=kind))


def pair_gradients(
    x: Tensor, grad: Tensor, dt: Tensor, decay: Tensor, scores: Tensor, segment_index: Tensor | None
) -> PairGradients:
    """Return the gradient by the scores, and sums of which `ssd_decays_triton` makes those of the decays and dt.

    Args:
        x: [B, S, H, P]; heads and values contiguous.
        grad: [B, S, H, P] of the scan's output; heads and values contiguous.
        dt: [B, H, c, L] fp32, 0 behind the sequence's end.
        decay: [B, H, c, L] fp32, running sums of dt A within a chunk.
        scores: [B, c, G, L, L] fp32, C_i . B_j, 0 across documents.
        segment_index: [B, S] int32.
    """
    batch, num_heads, num_chunks, chunk = dt.shape
    groups, head_dim = scores.shape[2], x.shape[3]
    tile = min(_TILE, chunk)
    tiles = chunk // tile
    grad_scores = torch.empty(scores.shape, dtype=x.dtype, device=x.device)
    parts = torch.empty(batch, num_heads, num_chunks, 2 * tiles + 1, chunk, dtype=torch.float32, device=x.device)
    own = torch.empty(dt.shape, dtype=torch.float32, device=x.device)
    _pairs[(tiles * (tiles + 1) // 2, batch * num_chunks, groups)](
        x, grad, dt, decay, scores, scores if segment_index is None else segment_index, grad_scores, parts, own,
        x.shape[1], num_chunks, x.stride(0), x.stride(1), grad.stride(0), grad.stride(1),
        HEADS=num_heads // groups, GROUPS=groups, P=head_dim, PADDED=max(triton.next_power_of_2(head_dim), 16), L=chunk,
        TILE=tile, TILES=tiles, PACKED=segment_index is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    return PairGradients(grad_scores, parts, own)
