"""FP8 tiles of relu(x)^2 and of its gradient, made in the same pass over memory in both directions.

Saves writing the bf16 result and reading it again, twice per MLP layer. Format and scales: ops/fp8.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotrain.ops.fp8 import BLOCK, Quantized

PLAIN, SQUARED_RELU, SQUARED_RELU_GRADIENT = 0, 1, 2


@triton.jit
def _power_of_two_scale(amax):
    """448 / amax rounded down to a power of two; 1 for all zeros, infinity and NaN."""
    scale = 448.0 / amax
    scale = tl.where(scale == float("inf"), 3.4028234663852886e38, scale)
    bits = scale.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where((amax > 0) & (amax < float("inf")), bits.to(tl.float32, bitcast=True), 1.0)


@triton.jit
def _value(x_ptr, grad_ptr, at, KIND: tl.constexpr):
    value = tl.load(x_ptr + at).to(tl.float32)
    if KIND > 0:
        value = tl.maximum(value, 0.0)
    if KIND == 1:
        value = value * value
    if KIND == 2:
        value = 2.0 * value * tl.load(grad_ptr + at).to(tl.float32)
    return value


@triton.jit
def _quantise(
    x_ptr, grad_ptr, rows_ptr, row_scales_ptr, columns_ptr, column_scales_ptr, height, width,
    KIND: tl.constexpr, B: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    tile_row, tile_column = tl.program_id(1), tl.program_id(0)
    base = tile_row.to(tl.int64) * B * width + tile_column * B
    every = tl.arange(0, B)
    for s in tl.static_range(0, B, SLICE):  # some rows at a time, all 128 columns
        some = s + tl.arange(0, SLICE)
        at = base + some[:, None] * width + every[None, :]
        value = _value(x_ptr, grad_ptr, at, KIND)
        scale = _power_of_two_scale(tl.max(tl.abs(value), axis=1))
        tl.store(row_scales_ptr + tile_column * height + tile_row * B + some, 1.0 / scale)
        tl.store(rows_ptr + at, (value * scale[:, None]).to(tl.float8e4nv))
    out = tile_column.to(tl.int64) * B * height + tile_row * B
    for s in tl.static_range(0, B, SLICE):  # some columns at a time, all 128 rows, which the cache still has
        some = s + tl.arange(0, SLICE)
        value = _value(x_ptr, grad_ptr, base + every[:, None] * width + some[None, :], KIND)
        scale = _power_of_two_scale(tl.max(tl.abs(value), axis=0))
        tl.store(column_scales_ptr + tile_row * width + tile_column * B + some, 1.0 / scale)
        column = tl.trans((value * scale[None, :]).to(tl.float8e4nv))
        tl.store(columns_ptr + out + some[:, None].to(tl.int64) * height + every[None, :], column)


def quantise_tiles(
    x: Tensor, grad: Tensor | None = None, *, kind: int = SQUARED_RELU, slice_width: int = 64, warps: int = 4
) -> Quantized:
    """Return x, relu(x)^2, or with `grad` its gradient 2 relu(x) grad, in FP8 tiles in both directions.

    Args:
        x: [M, K] contiguous; M and K multiples of 128.
        grad: [M, K] contiguous, of relu(x)^2.
        kind: PLAIN or SQUARED_RELU; without a meaning when `grad` is given.
        slice_width: rows or columns of a tile that are held at a time.
        warps: of a program.
    """
    height, width = x.shape
    rows, columns = (torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device) for shape in (x.shape, x.t().shape))
    row_scales = torch.empty(width // BLOCK, height, dtype=torch.float32, device=x.device)
    column_scales = torch.empty(height // BLOCK, width, dtype=torch.float32, device=x.device)
    _quantise[(width // BLOCK, height // BLOCK)](
        x, x if grad is None else grad, rows, row_scales, columns, column_scales, height, width,
        KIND=kind if grad is None else SQUARED_RELU_GRADIENT, B=BLOCK, SLICE=slice_width, num_warps=warps,
    )  # fmt: skip
    return Quantized(rows.view(torch.uint8), row_scales, columns.view(torch.uint8), column_scales)


def squared_relu_quantised(x: Tensor, grad: Tensor | None) -> Quantized:
    """See ops.fp8.squared_relu_quantised_ref."""
    return quantise_tiles(x.contiguous(), None if grad is None else grad.contiguous())
