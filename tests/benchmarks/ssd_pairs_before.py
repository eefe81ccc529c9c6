"""`ops/gpu/ssd_pairs_triton.py` as it was while mamba-ssm made the other gradients, for bench_scan_backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64


@triton.jit
def _pairs(
    x_ptr, grad_ptr, dt_ptr, decay_ptr, scores_ptr, segment_ptr, grad_scores_ptr, parts_ptr,
    length, num_chunks, stride_x_batch, stride_x, stride_grad_batch, stride_grad,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr, L: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    pair, batch_chunk, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, chunk = batch_chunk // num_chunks, batch_chunk % num_chunks
    later = 0  # pairs of tiles are counted row by row of the lower triangle
    for row in tl.static_range(1, TILES):  # pyright: ignore[reportGeneralTypeIssues]
        later += (pair >= row * (row + 1) // 2).to(tl.int32)
    earlier = pair - later * (later + 1) // 2
    i, j = later * TILE + tl.arange(0, TILE), earlier * TILE + tl.arange(0, TILE)
    p = tl.arange(0, PADDED)
    start = chunk * L
    i_inside, j_inside = start + i < length, start + j < length
    below = i[:, None] > j[None, :]
    seen = i[:, None] >= j[None, :]
    if PACKED:
        ids = segment_ptr + batch.to(tl.int64) * length + start
        same = tl.load(ids + i, mask=i_inside, other=-1)[:, None] == tl.load(ids + j, mask=j_inside, other=-2)[None, :]
        seen = seen & same
    matrix = (batch_chunk.to(tl.int64) * GROUPS + group) * L * L
    scores = tl.load(scores_ptr + matrix + i[:, None] * L + j[None, :])
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
        product = tl.dot(grad, x) * tl.load(dt_ptr + row_at + j)[None, :]
        product *= tl.exp(tl.minimum(decay_i[:, None] - decay_j[None, :], 0.0))
        total += product
        by_decay = tl.where(below, product * scores, 0.0)  # scores are 0 across documents
        parts = parts_ptr + row_at * (2 * TILES)
        tl.store(parts + earlier * L + i, tl.sum(by_decay, axis=1))
        tl.store(parts + (TILES + later) * L + j, -tl.sum(by_decay, axis=0))
        x_ptr += P
        grad_ptr += P
        row_at += num_chunks * L
    kind = grad_scores_ptr.dtype.element_ty
    tl.store(grad_scores_ptr + matrix + i[:, None] * L + j[None, :], tl.where(seen, total, 0.0).to(kind))
    if later != earlier:
        tl.store(grad_scores_ptr + matrix + j[:, None] * L + i[None, :], tl.zeros((TILE, TILE), dtype=kind))


def pair_gradients(
    x: Tensor, grad: Tensor, dt: Tensor, decay: Tensor, scores: Tensor, segment_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients by the scores and by the running sums of the decays, of what stays within a chunk.

    Args:
        x: [B, S, H, P]; heads and values contiguous.
        grad: [B, S, H, P] of the scan's output; heads and values contiguous.
        dt: [B, H, c, L] fp32, 0 behind the sequence's end.
        decay: [B, H, c, L] fp32, running sums of dt A within a chunk.
        scores: [B, c, G, L, L] fp32, C_i . B_j, 0 across documents.
        segment_index: [B, S] int32.

    Returns:
        [B, c, G, L, L] in x's dtype, zero above the diagonal, and [B, H, c, L] fp32.
    """
    batch, num_heads, num_chunks, chunk = dt.shape
    groups, head_dim = scores.shape[2], x.shape[3]
    tile = min(_TILE, chunk)
    tiles = chunk // tile
    grad_scores = torch.empty(scores.shape, dtype=x.dtype, device=x.device)
    parts = torch.zeros(batch, num_heads, num_chunks, 2 * tiles, chunk, dtype=torch.float32, device=x.device)
    _pairs[(tiles * (tiles + 1) // 2, batch * num_chunks, groups)](
        x, grad, dt, decay, scores, scores if segment_index is None else segment_index, grad_scores, parts,
        x.shape[1], num_chunks, x.stride(0), x.stride(1), grad.stride(0), grad.stride(1),
        HEADS=num_heads // groups, GROUPS=groups, P=head_dim, PADDED=max(triton.next_power_of_2(head_dim), 16), L=chunk,
        TILE=tile, TILES=tiles, PACKED=segment_index is not None, num_warps=4, num_stages=3,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return grad_scores, parts.sum(3)
