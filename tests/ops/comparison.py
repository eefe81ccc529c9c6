"""Comparing a fast op with its slow twin, forward and backward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value where that is above 1."""
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def worst_error(
    fast: Callable[..., Tensor | tuple[Tensor, ...]],
    slow: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> float:
    """Run `fast` on `inputs` rounded to `dtype`, `slow` on the same values in fp64; compare outputs and gradients."""
    results = []
    for function, wide in ((fast, dtype), (slow, torch.float64)):
        leaves = [t.detach().to(dtype).to(wide).requires_grad_() for t in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [
            torch.randn(o.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) for o in outputs
        ]
        total = sum(((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True)), torch.zeros(()))
        gradients = torch.autograd.grad(total, leaves)
        results.append([*outputs, *gradients])
    return max(relative_error(a, b) for a, b in zip(*results, strict=True))


def random_segments(batch: int, length: int, mean: float, generator: torch.Generator) -> Tensor:
    """Segment ids [B, S] with documents of about `mean` tokens."""
    return (torch.rand(batch, length, generator=generator) < 1.0 / mean).int().cumsum(1).int()
