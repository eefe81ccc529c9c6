"""The AdamW update of a tensor in one pass over memory; see ops.moments for the formats."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotrain.ops.moments import BLOCK_SIZE, AdamWStep, Moments

_ROWS, _WARPS = 8, 8


@triton.jit
def _power_of_ten(exponent):
    return tl.exp2(exponent.to(tl.float32) * 3.3219280948873623)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _decode(place, SIGNED: tl.constexpr):
    """Map the place of a point above zero, counted from 1, to its value; 0 to 0. Undoes `_encode`.

    A decade's first place is a power of two (less one when unsigned), so a float of it holds decade and place within.
    """
    number = place if SIGNED else place + 1
    bits = number.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    decade = exponent if SIGNED else exponent - 1
    within = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0 + 0.5 * _power_of_two(-exponent)
    value = _power_of_ten(decade - 6) * (0.1 + 0.9 * within)
    return tl.where(place == 0, 0.0, tl.where(decade == 7, 1.0, value))


@triton.jit
def _encode(x, SIGNED: tl.constexpr):
    """Map [0, 1] to the place of the nearest point above zero, counted from 1; 0 = zero.

    The decade comes from a logarithm, the place in it from arithmetic; below 0.2 of a step the last point of the decade
    before is nearer, which is also what a logarithm rounded up leads to.
    """
    decade = tl.minimum(tl.maximum(tl.floor(tl.log2(x) * 0.30102999566398 + 7.0), 0.0), 6.0).to(tl.int32)
    exponent = decade if SIGNED else decade + 1
    count = 1 << exponent
    within = (x * _power_of_ten(6 - decade) - 0.1) * (_power_of_two(exponent) * 1.1111111111111112)
    lowest = 0.19444445 if SIGNED else 0.13888889
    step = tl.minimum(within.to(tl.int32), count - 1)
    step = tl.where((decade == 6) & (within >= count.to(tl.float32) - 0.25), count, step)
    step = tl.where(within < tl.where(decade == 0, lowest, 0.2), -1, step)
    return step + (count if SIGNED else count - 1)


@triton.jit(do_not_specialize=["key0", "key1"])
def _update(
    parameter_ptr, gradient_ptr, average_ptr, square_ptr, average_scale_ptr, square_scale_ptr, allowed_ptr,
    count, rate, kept, beta1, beta2, epsilon, inverse_root2, key0, key1,
    QUANTISED: tl.constexpr, STOCHASTIC: tl.constexpr, GUARDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if GUARDED:  # noqa: SIM102 - a constant, decided when the kernel is compiled
        if tl.load(allowed_ptr) == 0:
            return
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < count
    row_inside = rows * BLOCK < count
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(parameter_ptr + at, mask=inside, other=0.0).to(tl.float32)
    average = tl.load(average_ptr + at, mask=inside, other=0)
    square = tl.load(square_ptr + at, mask=inside, other=0)
    if QUANTISED:
        average_scale = tl.load(average_scale_ptr + rows, mask=row_inside, other=0.0)
        square_scale = tl.load(square_scale_ptr + rows, mask=row_inside, other=0.0)
        code = average.to(tl.int32) - 127
        average = tl.where(code < 0, -1.0, 1.0) * _decode(tl.abs(code), True) * average_scale[:, None]
        square = _decode(square.to(tl.int32), False) * square_scale[:, None]
    average = average.to(tl.float32) * beta1 + gradient * (1.0 - beta1)
    square = square.to(tl.float32) * beta2 + gradient * gradient * (1.0 - beta2)
    value = value * kept - rate * average / (tl.sqrt(square) * inverse_root2 + epsilon)
    if QUANTISED:
        size = tl.abs(average)
        average_scale = tl.max(size, axis=1)
        square_scale = tl.max(square, axis=1)
        tl.store(average_scale_ptr + rows, average_scale, mask=row_inside)
        tl.store(square_scale_ptr + rows, square_scale, mask=row_inside)
        code = _encode(size * (1.0 / tl.where(average_scale > 0, average_scale, 1.0))[:, None], True)
        code = tl.where(average < 0, 127 - tl.minimum(code, 127), 127 + code)
        tl.store(average_ptr + at, code.to(tl.uint8), mask=inside)
        code = _encode(square * (1.0 / tl.where(square_scale > 0, square_scale, 1.0))[:, None], False)
        code = tl.where(square > 0, tl.maximum(code, 1), 0)
        tl.store(square_ptr + at, code.to(tl.uint8), mask=inside)
    else:
        tl.store(average_ptr + at, average, mask=inside)
        tl.store(square_ptr + at, square, mask=inside)
    if STOCHASTIC:
        x = at.to(tl.uint32) ^ key0.to(tl.uint32)
        x = x ^ (x >> 16)
        x = x * 0x7FEB352D + key1.to(tl.uint32)
        x = x ^ (x >> 15)
        x = x * 0x846CA68B
        bits = value.to(tl.uint32, bitcast=True) + (x >> 16)
        tl.store(parameter_ptr + at, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(parameter_ptr + at, value, mask=inside)


def adamw_update(
    parameter: Tensor, gradient: Tensor, moments: Moments, numbers: AdamWStep, allowed: Tensor | None = None
) -> None:
    """See ops.adamw.adamw_update."""
    assert parameter.is_contiguous() and gradient.shape == parameter.shape
    gradient = gradient.contiguous()
    quantised = moments.average_scale is not None
    correction1, correction2 = numbers.corrections
    _update[(triton.cdiv(parameter.numel(), _ROWS * BLOCK_SIZE),)](
        parameter,
        gradient,
        moments.average,
        moments.square,
        moments.average_scale if quantised else moments.average,
        moments.square_scale if quantised else moments.square,
        parameter if allowed is None else allowed,
        parameter.numel(),
        numbers.learning_rate / correction1,
        1.0 - numbers.learning_rate * numbers.weight_decay,
        numbers.beta1,
        numbers.beta2,
        numbers.epsilon,
        1.0 / math.sqrt(correction2),
        *numbers.key,
        QUANTISED=quantised,
        STOCHASTIC=parameter.dtype == torch.bfloat16,
        GUARDED=allowed is not None,
        ROWS=_ROWS,
        BLOCK=BLOCK_SIZE,
        num_warps=_WARPS,
    )
