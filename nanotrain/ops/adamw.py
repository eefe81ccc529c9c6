"""One AdamW update of one tensor, with moments in fp32, bf16 or 8 bits and weights in fp32 or stochastically rounded bf16.

The 8-bit form is Dettmers et al., arXiv:2110.02861: blocks of 256 values share a scale, and a value is one of 256 points that
lie densest near zero. Rounding noise is a hash of (key, position): nothing to save, and a resumed run draws the same.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nanotrain.ops.backends import kernel_for

BLOCK_SIZE = 256
"""Values that share a scale."""
MIN_QUANTISED = 4096
"""Smaller tensors keep fp32 moments, as in bitsandbytes: they weigh nothing."""
ZERO_CODE = 127
"""Code of zero among signed points; 0 among unsigned ones."""
_DECADES = 7


@dataclass(frozen=True)
class Moments:
    """The two averages of a tensor: in its shape, or as codes uint8 in its shape with a scale fp32 [numel / 256] each."""

    average: Tensor
    square: Tensor
    average_scale: Tensor | None = None
    square_scale: Tensor | None = None


@dataclass(frozen=True)
class AdamWStep:
    """The numbers of one update; `step` counts from 1, `key` is two integers below 2^31 that no other update has."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    step: int
    key: tuple[int, int]

    @property
    def corrections(self) -> tuple[float, float]:
        """1 - beta^step of both averages."""
        return 1.0 - self.beta1**self.step, 1.0 - self.beta2**self.step


def new_moments(parameter: Tensor, dtype: torch.dtype) -> Moments:
    """Return zero moments: fp32, bf16, or for uint8 codes and scales unless the tensor is small or no whole blocks."""
    if dtype == torch.uint8:
        if parameter.numel() >= MIN_QUANTISED and parameter.numel() % BLOCK_SIZE == 0:
            scale = torch.zeros(parameter.numel() // BLOCK_SIZE, dtype=torch.float32, device=parameter.device)
            zero = torch.full_like(parameter, ZERO_CODE, dtype=torch.uint8)
            return Moments(zero, torch.zeros_like(zero), scale, scale.clone())
        dtype = torch.float32
    zeros = torch.zeros_like(parameter, dtype=dtype)
    return Moments(zeros, zeros.clone())


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


@cache
def points(signed: bool) -> tuple[float, ...]:
    """Return the 256 points in rising order: each decade below 1 has twice as many as the one below it, 0 and 1 come on top.

    Signed points have no -1. The same as bitsandbytes' and torchao's `create_dynamic_map`.
    """
    positive = []
    for decade in range(_DECADES):
        borders = torch.linspace(0.1, 1.0, 2 ** (decade + (0 if signed else 1)) + 1)
        middles = (borders[:-1] + borders[1:]) / 2.0
        positive += (10.0 ** (decade + 1 - _DECADES) * middles).tolist()
    negative = [-value for value in reversed(positive)] if signed else []
    return (*negative, 0.0, *positive, 1.0)


def quantise(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the nearest codes uint8 in the shape of `values` and the scales fp32 [numel / 256].

    An unsigned value above zero never becomes zero: a second moment of zero below a first one that is not would make
    the next step huge.
    """
    blocks = values.reshape(-1, BLOCK_SIZE)
    scale = blocks.abs().amax(1)
    table = torch.tensor(points(signed), device=values.device)
    borders = (table[:-1] + table[1:]) / 2.0
    normed = blocks / scale.where(scale > 0, 1.0)[:, None]
    codes = torch.bucketize(normed, borders, right=True)
    if not signed:
        codes = codes.clamp(min=1).where(blocks > 0, 0)
    return codes.to(torch.uint8).view(values.shape), scale


def dequantise(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """Return the values fp32 in the shape of `codes`."""
    table = torch.tensor(points(signed), device=codes.device)
    return (table[codes.reshape(-1, BLOCK_SIZE).int()] * scale[:, None]).view(codes.shape)


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
