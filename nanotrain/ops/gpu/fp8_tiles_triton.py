"""FP8 tiles of a matrix, of relu(x)^2 or of its gradient, made in one pass over memory in both directions.

Of relu(x)^2 this saves writing the bf16 result and reading it again, twice per MLP layer. Format and scales: ops/fp8.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotrain.ops.fp8 import BLOCK, Quantized

PLAIN, SQUARED_RELU, SQUARED_RELU_GRADIENT = 0, 1, 2


class Launch(NamedTuple):
    """How the kernel runs; the result does not depend on it."""

    warps: int
    """Of a program, which makes one block of 128 x 128."""
    columns: int
    """Neighbouring values of a row that a thread holds: 8 or 16."""
    registers: int | None
    """The most of a thread, fewer than the compiler would take, so that more programs fit; None = as it likes."""
    packed: bool
    """Keep the values of a plain bf16 matrix in pairs, half of the registers, for some more instructions."""
    group: int
    """Blocks below each other that run side by side: the transposed matrix is written in runs of 128 bytes each."""


LAUNCH = Launch(warps=4, columns=16, registers=168, packed=False, group=2)
PLAIN_BF16_LAUNCH = Launch(warps=4, columns=16, registers=128, packed=True, group=8)
"""The fastest of twelve on an H200 (docs/benchmarks/one_gpu_h200_202611.md)."""


@triton.jit
def _scale(amax):
    """448 / amax rounded down to a power of two; 1 for all zeros, infinity and NaN.

    448 is 1.75 x 2^8. The bits of amax taken from those of 1.75 x 2^(8 + 127) leave the quotient's exponent, one less
    where amax has the larger mantissa.
    """
    bits = amax.to(tl.uint32, bitcast=True)
    power = tl.minimum(0x83600000 - bits, 0x7F7FFFFF) & 0x7F800000
    return tl.where(bits - 1 < 0x7F7FFFFF, power, 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _exponent(scale):
    """In one byte, which the compiler then moves between threads instead of what `_inverse` makes of it."""
    return (scale.to(tl.uint32, bitcast=True) >> 23).to(tl.uint8)


@triton.jit
def _inverse(exponent):
    """1 / scale; that of the largest one is below the normal numbers."""
    bits = (254 - exponent.to(tl.uint32)) << 23
    return tl.where(bits == 0, 0x00400000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _value(x_ptr, grad_ptr, at, KIND: tl.constexpr):
    value = tl.load(x_ptr + at)
    if KIND > 0:
        value = tl.maximum(value.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
    if KIND == 1:
        value = value * value
    if KIND == 2:
        value = 2.0 * value * tl.load(grad_ptr + at).to(tl.float32)
    return value


@triton.jit
def _rows(value, rows_ptr, at):
    """Write some rows in FP8; return their scales' exponents."""
    value = value.to(tl.float32)
    scale = _scale(tl.max(tl.abs(value), axis=1))
    tl.store(rows_ptr + at, (value * scale[:, None]).to(tl.float8e4nv))
    return _exponent(scale)


@triton.jit
def _interleaved(a, b, c, d):
    """[n] each, to [a0, b0, c0, d0, a1, ...]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [4 * a.shape[0]])


@triton.jit
def _larger(a, b, PACKED: tl.constexpr):
    if PACKED:
        return tl.maximum(tl.abs(a), tl.abs(b))  # two at a time
    return tl.maximum(tl.abs(a.to(tl.float32)), tl.abs(b.to(tl.float32)))


@triton.jit
def _two_bytes(a, b):
    """a and b in FP8, converted as a pair, as one number."""
    low, high = tl.split(tl.join(a, b).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32))
    return low | (high << 8)


@triton.jit
def _quantise(
    x_ptr, grad_ptr, rows_ptr, row_scales_ptr, columns_ptr, column_scales_ptr, height, width,
    KIND: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    tile_row, tile_column = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), tl.program_id(1)
    if tile_row * B >= height:
        return
    base = tile_row.to(tl.int64) * B * width + tile_column * B
    x_ptr += base
    grad_ptr += base
    rows_ptr += base
    row_scales_ptr += tile_column * height + tile_row * B
    columns_ptr += tile_column.to(tl.int64) * B * height + tile_row * B
    column_scales_ptr += tile_row * width + tile_column * B
    every, quarter = tl.arange(0, B), tl.arange(0, B // 4)
    # Every fourth row in a tensor of its own, [32, 128]: so the four bytes that lie side by side in the transposed matrix
    # are one thread's, which makes them a word: a quarter of the traffic when words are transposed between threads.
    at = 4 * quarter[:, None] * width + every[None, :]
    a = _value(x_ptr, grad_ptr, at, KIND)
    b = _value(x_ptr + width, grad_ptr + width, at, KIND)
    c = _value(x_ptr + 2 * width, grad_ptr + 2 * width, at, KIND)
    d = _value(x_ptr + 3 * width, grad_ptr + 3 * width, at, KIND)

    at = tl.max_contiguous(at, [1, COLUMNS])  # the stores decide how the threads share the block, the loads follow
    a_exponent = _rows(a, rows_ptr, at)
    b_exponent = _rows(b, rows_ptr + width, at)
    c_exponent = _rows(c, rows_ptr + 2 * width, at)
    d_exponent = _rows(d, rows_ptr + 3 * width, at)
    tl.store(row_scales_ptr + every, _inverse(_interleaved(a_exponent, b_exponent, c_exponent, d_exponent)))

    largest = _larger(_larger(a, b, PACKED), _larger(c, d, PACKED), PACKED).to(tl.float32)
    column_scale = _scale(tl.max(largest, axis=0))
    tl.store(column_scales_ptr + every, _inverse(_exponent(column_scale)))
    scale = column_scale[None, :]
    if PACKED:
        scale = scale.to(tl.bfloat16)  # a power of two: the products are exact, or below what FP8 tells from 0
    else:
        a, b, c, d = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
    word = _two_bytes(a * scale, b * scale) | (_two_bytes(c * scale, d * scale) << 16)
    words_ptr = columns_ptr.to(tl.pointer_type(tl.int32))
    tl.store(words_ptr + every[:, None] * (height // 4) + quarter[None, :], tl.trans(word))


def quantise_tiles(
    x: Tensor, grad: Tensor | None = None, *, kind: int = SQUARED_RELU, launch: Launch | None = None
) -> Quantized:
    """Return x, relu(x)^2, or with `grad` its gradient 2 relu(x) grad, in FP8 tiles in both directions.

    Args:
        x: [M, K] contiguous; M and K multiples of 128.
        grad: [M, K] contiguous, of relu(x)^2.
        kind: PLAIN or SQUARED_RELU; without a meaning when `grad` is given.
        launch: of the kernel; None = the fastest.
    """
    height, width = x.shape
    rows, columns = (torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device) for shape in (x.shape, x.t().shape))
    row_scales = torch.empty(width // BLOCK, height, dtype=torch.float32, device=x.device)
    column_scales = torch.empty(height // BLOCK, width, dtype=torch.float32, device=x.device)
    kind = kind if grad is None else SQUARED_RELU_GRADIENT
    plain_bf16 = kind == PLAIN and x.dtype == torch.bfloat16
    if launch is None:
        launch = PLAIN_BF16_LAUNCH if plain_bf16 else LAUNCH
    packed = launch.packed and plain_bf16
    _quantise[(launch.group, width // BLOCK, triton.cdiv(height // BLOCK, launch.group))](
        x, x if grad is None else grad, rows, row_scales, columns, column_scales, height, width,
        KIND=kind, B=BLOCK, COLUMNS=launch.columns, PACKED=packed,
        num_warps=launch.warps, maxnreg=launch.registers,
    )  # fmt: skip
    return Quantized(rows.view(torch.uint8), row_scales, columns.view(torch.uint8), column_scales)


def squared_relu_quantised(x: Tensor, grad: Tensor | None) -> Quantized:
    """See ops.fp8.squared_relu_quantised_ref."""
    return quantise_tiles(x.contiguous(), None if grad is None else grad.contiguous())
