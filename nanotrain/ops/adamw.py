"""One AdamW update of one tensor, with moments in fp32, bf16 or 8 bits and weights in fp32 or stochastically rounded bf16.

Rounding noise is a hash of (key, position): nothing to save, and a resumed run draws the same.
"""

import math

import torch
from torch import Tensor

from nanotrain.ops.backends import kernel_for
from nanotrain.ops.moments import AdamWStep, Moments, dequantise, quantise


@torch.no_grad()
def adamw_update(
    parameter: Tensor, gradient: Tensor, moments: Moments, numbers: AdamWStep, allowed: Tensor | None = None
) -> None:
    """Update `parameter` and `moments` in place; arithmetic in fp32.

    Args:
        parameter: fp32, or bf16 that is rounded stochastically; contiguous.
        gradient: in its shape.
        moments: as `new_moments` made them.
        numbers: of this update.
        allowed: [] bool on the device; False = nothing is written. The device decides, so that nothing waits for it.
    """
    kernel = kernel_for("adamw", parameter) or adamw_update_ref
    kernel(parameter, gradient, moments, numbers, allowed)


@torch.no_grad()
def adamw_update_ref(
    parameter: Tensor, gradient: Tensor, moments: Moments, numbers: AdamWStep, allowed: Tensor | None = None
) -> None:
    """Do what `adamw_update` does, in plain PyTorch; reads `allowed`."""
    if allowed is not None and not bool(allowed):
        return
    correction1, correction2 = numbers.corrections
    average = _load(moments.average, moments.average_scale, signed=True)
    square = _load(moments.square, moments.square_scale, signed=False)
    gradient = gradient.float()
    average = average * numbers.beta1 + gradient * (1.0 - numbers.beta1)
    square = square * numbers.beta2 + gradient * gradient * (1.0 - numbers.beta2)
    denominator = square.sqrt() / math.sqrt(correction2) + numbers.epsilon
    value = parameter.float() * (1.0 - numbers.learning_rate * numbers.weight_decay)
    value = value - (numbers.learning_rate / correction1) * average / denominator
    _store(average, moments.average, moments.average_scale, signed=True)
    _store(square, moments.square, moments.square_scale, signed=False)
    if parameter.dtype == torch.bfloat16:
        value = stochastically_rounded(value, numbers.key)
    parameter.copy_(value)


def _load(values: Tensor, scale: Tensor | None, *, signed: bool) -> Tensor:
    return values.float() if scale is None else dequantise(values, scale, signed=signed)


def _store(values: Tensor, target: Tensor, scale: Tensor | None, *, signed: bool) -> None:
    if scale is None:
        target.copy_(values)
    else:
        codes, new_scale = quantise(values, signed=signed)
        target.copy_(codes)
        scale.copy_(new_scale)


def stochastically_rounded(values: Tensor, key: tuple[int, int]) -> Tensor:
    """Round fp32 to bf16, up with the probability of the part cut off; the mean of a rounded value is the value."""
    noise = rounding_noise(values.numel(), key, values.device).view(values.shape)
    bits = values.contiguous().view(torch.int32) + noise.to(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def rounding_noise(count: int, key: tuple[int, int], device: torch.device) -> Tensor:
    """Return `count` integers in [0, 65536), int64: a 32-bit hash of position and key (two rounds of xor-shift-multiply)."""
    mask = 0xFFFFFFFF
    x = torch.arange(count, dtype=torch.int64, device=device) & mask
    x ^= key[0]
    x ^= x >> 16
    x = (x * 0x7FEB352D + key[1]) & mask
    x ^= x >> 15
    x = (x * 0x846CA68B) & mask
    return x >> 16
