"""FP8 (E4M3) quantisation in blocks, as the published models were trained: the format, and its slow twin.

Activations and gradients are scaled in tiles of 128 values, weights in blocks of 128 x 128. A scale is the power of two
that brings the largest magnitude of its tile just under 448, E4M3's largest number (Transformer Engine's
Float8BlockScaling). A product along K therefore rescales every 128 terms.

Both directions of a matrix are kept, because Hopper multiplies FP8 only along the contiguous dimension: `rows` for
products over columns (the forward pass, for an activation), `columns`, transposed, for products over rows (the weight's
gradient).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Quantized:
    """A matrix [M, K] in FP8. Either direction may be missing.

    Scales multiply the stored values to give the originals. Their layout is that of the GEMM libraries, with columns
    padded to a multiple of 4.

    Attributes:
        rows: [M, K] uint8 holding E4M3 (or another FP8 format), scaled along K.
        row_scales: tiles: [K / 128, M]; blocks: [M / 128, K / 128]; whole tensor: [1].
        columns: [K, M], the transposed matrix, scaled along M.
        column_scales: tiles: [M / 128, K]; blocks: [K / 128, M / 128]; whole tensor: [1].
    """

    rows: Tensor | None
    row_scales: Tensor | None
    columns: Tensor | None
    column_scales: Tensor | None


def power_of_two_scale_ref(amax: Tensor) -> Tensor:
    """Return the multiplier of tiles with largest magnitude `amax`: 448 / amax rounded down to a power of two, fp32.

    1 where the tile is all zero or not finite, as Transformer Engine has it; the largest power of two where the quotient
    overflows.
    """
    scale = E4M3_MAX / amax.float()
    scale = torch.where(scale.isinf(), torch.finfo(torch.float32).max, scale)
    exponent = torch.frexp(scale).exponent - 1
    power = torch.ldexp(torch.ones_like(scale), exponent)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, power)


def quantize_tiles_ref(x: Tensor) -> Quantized:
    """Quantise a matrix [M, K], M and K multiples of 128, in 1 x 128 tiles in both directions."""
    rows, row_scales = _tiles(x)
    columns, column_scales = _tiles(x.t())
    return Quantized(rows, row_scales, columns, column_scales)


def _tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    tiles = x.float().unflatten(1, (-1, BLOCK))  # [M, K / 128, 128]
    scale = power_of_two_scale_ref(tiles.abs().amax(-1))
    values = (tiles * scale[..., None]).flatten(1)
    return to_e4m3(values), (1.0 / scale).t().contiguous()


def quantize_blocks_ref(weight: Tensor) -> Quantized:
    """Quantise a matrix [N, K], N and K multiples of 128, in 128 x 128 blocks; both directions hold the same values."""
    blocks = weight.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [N / 128, 128, K / 128, 128]
    scale = power_of_two_scale_ref(blocks.abs().amax((1, 3)))
    values = to_e4m3((blocks * scale[:, None, :, None]).flatten(2).flatten(0, 1))
    inverse = 1.0 / scale
    return Quantized(values, _padded(inverse), values.t().contiguous(), _padded(inverse.t()))


def _padded(scales: Tensor) -> Tensor:
    return torch.nn.functional.pad(scales, (0, -scales.shape[1] % 4)).contiguous()


def to_e4m3(values: Tensor) -> Tensor:
    """Round to the nearest E4M3 number, ties to even, saturating at 448; as raw bytes."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def dequantize_ref(data: Tensor, scales: Tensor, *, blocks: bool) -> Tensor:
    """Return the fp64 matrix [M, K] that E4M3 bytes `data` [M, K] and their `scales` stand for.

    Args:
        data: [M, K] uint8.
        scales: as in `Quantized`: of tiles, or of blocks when `blocks` is set.
        blocks: 128 x 128 blocks.
    """
    values = data.view(torch.float8_e4m3fn).double()
    per_value = scales.double()
    if blocks:
        per_value = per_value[:, : data.shape[1] // BLOCK].repeat_interleave(BLOCK, 0)
    else:
        per_value = per_value[:, : data.shape[0]].t()
    return values * per_value.repeat_interleave(BLOCK, 1)


def squared_relu_quantised_ref(x: Tensor, grad: Tensor | None) -> Quantized:
    """Return relu(x)^2, or with `grad` its gradient, in tiles; x and grad [M, K]."""
    positive = x.float().clamp(min=0.0)
    return quantize_tiles_ref(positive * positive if grad is None else 2.0 * positive * grad.float())


class EmulatedProducts:
    """The products of a linear layer from quantised operands, in fp64: the slow twin of a GEMM library's.

    The interface is `ops.linear.QuantizedProducts`.
    """

    row_multiple = BLOCK

    def __init__(self, *, fused: bool = False) -> None:
        self.squared_relu_quantised = squared_relu_quantised_ref if fused else None

    def quantize_activation(self, x: Tensor, *, columns: bool) -> Quantized:
        del columns
        return quantize_tiles_ref(x)

    def quantize_gradient(self, grad: Tensor) -> Quantized:
        return quantize_tiles_ref(grad)

    def quantize_weight(self, weight: Tensor) -> Quantized:
        return quantize_blocks_ref(weight)

    def output(self, x: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        return (_rows(x, blocks=False) @ _rows(weight, blocks=True).t()).to(dtype)

    def input_gradient(self, grad: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        return (_rows(grad, blocks=False) @ _columns(weight, blocks=True).t()).to(dtype)

    def weight_gradient(self, grad: Quantized, x: Quantized, dtype: torch.dtype) -> Tensor:
        return (_columns(grad, blocks=False) @ _columns(x, blocks=False).t()).to(dtype)


def _rows(matrix: Quantized, *, blocks: bool) -> Tensor:
    assert matrix.rows is not None and matrix.row_scales is not None
    return dequantize_ref(matrix.rows, matrix.row_scales, blocks=blocks)


def _columns(matrix: Quantized, *, blocks: bool) -> Tensor:
    assert matrix.columns is not None and matrix.column_scales is not None
    return dequantize_ref(matrix.columns, matrix.column_scales, blocks=blocks)
