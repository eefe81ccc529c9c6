"""The moments of AdamW in fp32, bf16 or 8 bits, and the numbers of one update.

The 8-bit form is Dettmers et al., arXiv:2110.02861: blocks of 256 values share a scale, and a value is one of 256 points that
lie densest near zero.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

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
    """The numbers of one update; `step` counts from 1, `key` is `rounding_key` of tensor and step."""

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


def rounding_key(name: str, step: int) -> tuple[int, int]:
    """Return two integers below 2^31, for the rounding noise of the tensor `name` in the update number `step`."""
    digest = hashlib.sha256(f"{name}/{step}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1, int.from_bytes(digest[4:8], "big") >> 1


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
