"""RMSNorm, and the gated RMSNorm in groups that ends a Mamba-2 mixer. Both compute in fp32 and cast back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotrain.ops.backends import kernel_for


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    The result is cast to x's dtype before the weight is applied, as NemotronH does.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.
    """
    kernel = kernel_for("rms_norm", x)
    if kernel is not None:
        return kernel(x, weight, eps)
    wide = _at_least_fp32(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def branch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `rms_norm` of x and x itself, for a branch around what the norm feeds.

    A kernel then adds the gradients of both in one pass.
    """
    kernel = kernel_for("rms_norm", x)
    if kernel is not None and torch.is_grad_enabled():
        return kernel(x, weight, eps, branch=True)
    return rms_norm(x, weight, eps), x


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Slow twin of `rms_norm`: fp64, one vector at a time."""
    rows = [row / (row @ row / row.numel() + eps).sqrt() for row in x.double().reshape(-1, x.shape[-1])]
    return torch.stack(rows).reshape(x.shape).to(x.dtype) * weight


def grouped_gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
    """Gate, then normalise each group of channels on its own: RMSNorm(y * silu(z)) in `num_groups` groups.

    Args:
        y: [..., D].
        z: [..., D], the gate before its SiLU.
        weight: [D].
        eps: added to the mean square.
        num_groups: divides D.

    Returns:
        [..., D] in y's dtype.
    """
    kernel = kernel_for("gated_rms_norm", y)
    if kernel is not None:
        return kernel(y, z, weight, eps, num_groups)
    gated = _at_least_fp32(y) * F.silu(_at_least_fp32(z))
    groups = gated.unflatten(-1, (num_groups, -1))
    normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return normed.flatten(-2).to(y.dtype) * weight


def grouped_gated_rms_norm_ref(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
    """Slow twin of `grouped_gated_rms_norm`: fp64, one group at a time."""
    gated = y.double() * z.double() * torch.sigmoid(z.double())
    width = y.shape[-1] // num_groups
    parts = [
        rms_norm_ref(gated[..., i * width : (i + 1) * width], torch.ones(width, dtype=torch.float64), eps)
        for i in range(num_groups)
    ]
    return torch.cat(parts, dim=-1).to(y.dtype) * weight
