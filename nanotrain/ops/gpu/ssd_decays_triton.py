"""The gradients of the decays and of dt out of the sums that the other kernels of the scan's backward pass leave."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 4
"""Chunks of heads in a program."""


@triton.jit
def _decays(
    dt_ptr, pairs_ptr, of_B_ptr, of_C_ptr, chunk_ptr, grad_dA_ptr, grad_dt_ptr, count,
    TILES: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, l = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, L)[None, :]  # noqa: E741
    inside = (row < count) & (l >= 0)
    row = row.to(tl.int64)
    at, pairs = row * L + l, pairs_ptr + row * ((2 * TILES + 1) * L) + l
    dt = tl.load(dt_ptr + at, mask=inside, other=0.0)
    grad_dt = tl.load(pairs + 2 * TILES * L, mask=inside, other=0.0)
    earlier, later = tl.zeros((ROWS, L), tl.float32), tl.zeros((ROWS, L), tl.float32)
    for tile in tl.static_range(TILES):
        earlier += tl.load(pairs + tile * L, mask=inside & (l // TILE >= tile), other=0.0)
        later += tl.load(pairs + (TILES + tile) * L, mask=inside & (l // TILE <= tile), other=0.0)
    grad_decay = earlier - later * dt
    grad_decay += tl.where(l == L - 1, tl.load(chunk_ptr + row, mask=row < count, other=0.0), 0.0)
    to_end = tl.zeros((ROWS, L), tl.float32)
    grad_dt += later
    parts = row * (PARTS * L) + l
    for part in tl.static_range(PARTS):
        grad_decay += tl.load(of_C_ptr + parts + part * L, mask=inside, other=0.0)
        grad_dt += tl.load(of_B_ptr + parts + part * L, mask=inside, other=0.0)
        to_end += tl.load(of_B_ptr + parts + part * L - 1, mask=inside & (l > 0), other=0.0)
    to_end *= tl.load(dt_ptr + at - 1, mask=inside & (l > 0), other=0.0)
    # A decay counts in the running sums of all later positions, and on the way to the chunk's end of all earlier ones.
    grad_dA = tl.cumsum(grad_decay, axis=1, reverse=True) + tl.cumsum(to_end, axis=1)
    tl.store(grad_dA_ptr + at, grad_dA, mask=inside)
    tl.store(grad_dt_ptr + at, grad_dt, mask=inside)


def gradients_of_decays(
    dt: Tensor, pairs: Tensor, of_B: Tensor, of_C: Tensor, of_chunks: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients by dt A and by the dt that scales inputs, both [B, H, c, L] fp32.

    Args:
        dt: [B, H, c, L] fp32.
        pairs: [B, H, c, 2 T + 1, L] fp32, the parts of `PairGradients`.
        of_B: [B, H, c, parts, L] fp32, of `gradient_of_B`.
        of_C: [B, H, c, parts, L] fp32, of `gradient_of_C`.
        of_chunks: [B, H, c] fp32, by each chunk's whole decay.
    """
    chunk, tiles = dt.shape[3], pairs.shape[3] // 2
    grad_dA, grad_dt = torch.empty_like(dt), torch.empty_like(dt)
    count = of_chunks.numel()
    _decays[(triton.cdiv(count, _ROWS),)](
        dt, pairs, of_B, of_C, of_chunks, grad_dA, grad_dt, count,
        TILES=tiles, TILE=chunk // tiles, PARTS=of_B.shape[3], L=chunk, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return grad_dA, grad_dt
