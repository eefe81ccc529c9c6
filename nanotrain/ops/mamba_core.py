"""What a Mamba-2 mixer does between its projections: convolution, scan, gate and grouped norm, from one wide tensor.

As one op, because a kernel can then write the gradients of all its parts straight into the gradient of that tensor, and keep
the scan's states for the backward pass instead of making them again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotrain.ops.backends import kernel_for
from nanotrain.ops.causal_conv1d import causal_conv1d, causal_conv1d_ref
from nanotrain.ops.mamba_layout import MambaParameters, MambaSizes, split_heads
from nanotrain.ops.rms_norm import grouped_gated_rms_norm, grouped_gated_rms_norm_ref
from nanotrain.ops.ssd import KERNEL_STATE_SIZES, ssd_scan, ssd_scan_ref


def mamba_core(
    zxBCdt: Tensor, parameters: MambaParameters, sizes: MambaSizes, segment_ids: Tensor | None = None
) -> Tensor:
    """Return RMSNorm(scan(conv(xBC), softplus(dt + bias)) * silu(z)), normed within each group.

    Args:
        zxBCdt: [B, S, 2 H P + 2 G N + H], what the input projection gave: z, x, B, C and dt side by side.
        parameters: of the mixer.
        sizes: of the mixer.
        segment_ids: [B, S]; convolution and state start afresh where the id changes.

    Returns:
        [B, S, H P] in the dtype of zxBCdt.
    """
    kernel = kernel_for("mamba_core", zxBCdt)
    if kernel is not None and _taken_by_kernels(parameters, sizes):
        return kernel(zxBCdt, parameters, sizes, segment_ids)
    z, xBC, dt = zxBCdt.split(sizes.widths, dim=-1)
    dt = F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + parameters.dt_bias)
    convolved = causal_conv1d(xBC, parameters.conv_weight, parameters.conv_bias, segment_ids=segment_ids)
    x, B, C = split_heads(convolved, sizes)
    A = -torch.exp(parameters.A_log.to(dt.dtype))
    y = ssd_scan(x, dt, A, B, C, parameters.D, chunk_size=sizes.chunk_size, segment_ids=segment_ids)[0]
    return grouped_gated_rms_norm(y.flatten(2), z, parameters.norm_weight, sizes.epsilon, sizes.num_groups)


def _taken_by_kernels(parameters: MambaParameters, sizes: MambaSizes) -> bool:
    aligned = all(width % 8 == 0 for width in (sum(sizes.widths), *sizes.widths[:2]))
    taps = parameters.conv_weight.shape[-1]
    return aligned and taps in (2, 3, 4) and sizes.head_dim >= 16 and sizes.state_size in KERNEL_STATE_SIZES


def mamba_core_ref(
    zxBCdt: Tensor, parameters: MambaParameters, sizes: MambaSizes, segment_ids: Tensor | None = None
) -> Tensor:
    """Slow twin of `mamba_core`: the slow twins of its parts, in fp64."""
    wide = MambaParameters(*(p.double() for p in parameters))
    z, xBC, dt = zxBCdt.double().split(sizes.widths, dim=-1)
    dt = torch.log1p(torch.exp(dt + wide.dt_bias))
    convolved = causal_conv1d_ref(xBC, wide.conv_weight, wide.conv_bias, segment_ids=segment_ids)
    x, B, C = split_heads(convolved, sizes)
    y = ssd_scan_ref(x, dt, -torch.exp(wide.A_log), B, C, wide.D, segment_ids=segment_ids)[0]
    y = grouped_gated_rms_norm_ref(y.flatten(2), z, wide.norm_weight, sizes.epsilon, sizes.num_groups)
    return y.to(zxBCdt.dtype)
