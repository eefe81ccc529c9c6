"""The linear losses' gradients times the gradient that reaches them: one pass over the largest tensor of the loss."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _scale(values_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    scaled = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    tl.store(values_ptr + at, scaled.to(values_ptr.dtype.element_ty), mask=inside)


def scale_in_place(gradient: Tensor, factor: Tensor) -> None:
    """Multiply `gradient`, contiguous and narrower than fp32, by `factor` [] fp32 in one pass, rounded once."""
    assert gradient.is_contiguous(), "parts of a tensor are not scaled in place"
    _scale[(triton.cdiv(gradient.numel(), _BLOCK),)](gradient, factor, gradient.numel(), BLOCK=_BLOCK, num_warps=8)
