"""relu(x)^2 and its gradient, quantised in 1 x 128 tiles both ways in the same pass over memory.

Saves writing the bf16 result and reading it again, twice per MLP layer. Format and scales: ops/fp8.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotrain.ops.fp8 import BLOCK, Quantized


@triton.jit
def _power_of_two_scale(amax):
    """448 / amax rounded down to a power of two; 1 for all zeros, infinity and NaN."""
    scale = 448.0 / amax
    scale = tl.where(scale == float("inf"), 3.4028234663852886e38, scale)
    bits = scale.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where((amax > 0) & (amax < float("inf")), bits.to(tl.float32, bitcast=True), 1.0)


@triton.jit
def _value(x_ptr, grad_ptr, at, BACKWARD: tl.constexpr):
    value = tl.maximum(tl.load(x_ptr + at).to(tl.float32), 0.0)
    if BACKWARD:
        return 2.0 * value * tl.load(grad_ptr + at).to(tl.float32)
    return value * value


@triton.jit
def _quantise(
    x_ptr, grad_ptr, rows_ptr, row_scales_ptr, columns_ptr, column_scales_ptr, height, width,
    BACKWARD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    tile_row, tile_column = tl.program_id(1), tl.program_id(0)
    base = tile_row.to(tl.int64) * B * width + tile_column * B
    i, j = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    value = _value(x_ptr + base, grad_ptr + base, i * width + j, BACKWARD)
    row_scale = _power_of_two_scale(tl.max(tl.abs(value), axis=1))
    column_scale = _power_of_two_scale(tl.max(tl.abs(value), axis=0))
    tl.store(row_scales_ptr + tile_column * height + tile_row * B + tl.arange(0, B), 1.0 / row_scale)
    tl.store(column_scales_ptr + tile_row * width + tile_column * B + tl.arange(0, B), 1.0 / column_scale)
    tl.store(rows_ptr + base + i * width + j, (value * row_scale[:, None]).to(tl.float8e4nv))
    columns = (value * column_scale[None, :]).to(tl.float8e4nv)
    out = columns_ptr + tile_column.to(tl.int64) * B * height + tile_row * B
    tl.store(out + tl.trans(j) * height + tl.trans(i), tl.trans(columns))


def squared_relu_quantised(x: Tensor, grad: Tensor | None = None) -> Quantized:
    """Return relu(x)^2, or with `grad` its gradient 2 relu(x) grad, in FP8 tiles in both directions.

    Args:
        x: [M, K] contiguous; M and K multiples of 128.
        grad: [M, K] contiguous, of relu(x)^2.
    """
    height, width = x.shape
    rows, columns = (torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device) for shape in (x.shape, x.t().shape))
    row_scales = torch.empty(width // BLOCK, height, dtype=torch.float32, device=x.device)
    column_scales = torch.empty(height // BLOCK, width, dtype=torch.float32, device=x.device)
    _quantise[(width // BLOCK, height // BLOCK)](
        x, x if grad is None else grad, rows, row_scales, columns, column_scales, height, width,
        BACKWARD=grad is not None, B=BLOCK, num_warps=16,
    )  # fmt: skip
    return Quantized(rows.view(torch.uint8), row_scales, columns.view(torch.uint8), column_scales)
