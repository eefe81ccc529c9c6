"""The state space scan and the gated norm of mamba-ssm (Triton), behind the signatures of our ops."""

import torch
from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn  # pyright: ignore[reportMissingImports]
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]
from torch import Tensor

from nanotrain.ops.gpu.tuned_configs import restrict_to_tuned
from nanotrain.ops.segments import segment_indices


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    chunk_size: int,
    segment_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ops.ssd.ssd_scan. States and decays are fp32; products run in x's dtype (fp32: TF32)."""
    index = None if segment_ids is None else segment_indices(segment_ids)
    chunk_size = power_of_two(chunk_size)
    restrict_to_tuned(x.shape[-1], B.shape[-1], chunk_size, x.dtype)
    with torch.autocast("cuda", enabled=False):
        return mamba_chunk_scan_combined(
            x,
            dt.float(),
            A.float(),
            B.to(x.dtype),
            C.to(x.dtype),
            chunk_size=chunk_size,
            D=D.float(),
            initial_states=initial_state,
            seq_idx=index,
            return_final_states=True,
        )


def power_of_two(chunk_size: int) -> int:
    """The kernels' tiles need a chunk of 16 ... 256 positions; the chunk's length does not change the result."""
    return min(max(16, 1 << (chunk_size - 1).bit_length()), 256)


def grouped_gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
    """See ops.rms_norm.grouped_gated_rms_norm."""
    return rmsnorm_fn(y, weight, None, z=z, eps=eps, group_size=y.shape[-1] // num_groups, norm_before_gate=False)
