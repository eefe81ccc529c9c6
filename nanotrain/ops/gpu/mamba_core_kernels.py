"""The core of a Mamba-2 mixer out of the kernels of causal-conv1d and mamba-ssm and our own, as one autograd function.

The scan's states are kept (bf16, as the products read them) instead of made again in the backward pass, and each part
writes its gradient straight into its columns of the gradient of the wide input.
"""

from typing import Any

import torch
from causal_conv1d.cpp_functions import (  # pyright: ignore[reportMissingImports]
    causal_conv1d_bwd_function,
    causal_conv1d_fwd_function,
)
from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_bwd, _bmm_chunk_fwd  # pyright: ignore[reportMissingImports]
from mamba_ssm.ops.triton.ssd_chunk_state import (  # pyright: ignore[reportMissingImports]
    _chunk_cumsum_bwd,
    _chunk_cumsum_fwd,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanotrain.ops.gpu import gated_norm_triton
from nanotrain.ops.gpu.mamba_ssm_kernels import power_of_two
from nanotrain.ops.gpu.ssd_columns_triton import gradient_of_B, gradient_of_C
from nanotrain.ops.gpu.ssd_decays_triton import gradients_of_decays
from nanotrain.ops.gpu.ssd_pairs_triton import pair_gradients
from nanotrain.ops.gpu.ssd_scan_triton import gradient_of_inputs, scan_outputs
from nanotrain.ops.gpu.ssd_states_triton import gradients_of_states, states_before_chunks
from nanotrain.ops.gpu.tuned_configs import restrict_to_tuned
from nanotrain.ops.mamba_layout import MambaParameters, MambaSizes, split_heads
from nanotrain.ops.segments import segment_indices


class _MambaCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, zxBCdt: Tensor, sizes: MambaSizes, index: Tensor | None, *parameters: Tensor) -> Tensor:
        p = MambaParameters(*parameters)
        chunk = power_of_two(sizes.chunk_size)
        z, xBC, dt = zxBCdt.split(sizes.widths, dim=-1)
        convolved = causal_conv1d_fwd_function(
            xBC.transpose(1, 2), p.conv_weight[:, 0], p.conv_bias, index, None, None, True
        ).transpose(1, 2)
        x, B, C = split_heads(convolved, sizes)
        A = -torch.exp(p.A_log.float())
        decay, dt = _chunk_cumsum_fwd(dt, A, chunk, dt_bias=p.dt_bias.float(), dt_softplus=True)
        states = states_before_chunks(x, dt, decay, B, index)
        y = scan_outputs(x, dt, decay, B, C, states, p.D.float(), index).view(-1, sizes.inner)
        out, scale = gated_norm_triton.forward(y, z.flatten(0, 1), p.norm_weight, sizes.epsilon, sizes.num_groups)
        ctx.save_for_backward(zxBCdt, index, convolved, decay, dt, states, y, scale, *parameters)
        ctx.sizes = sizes
        return out.view(*zxBCdt.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        zxBCdt, index, convolved, decay, dt, states, y, scale, *parameters = ctx.saved_tensors
        sizes: MambaSizes = ctx.sizes
        p = MambaParameters(*parameters)
        z, xBC, raw_dt = zxBCdt.split(sizes.widths, dim=-1)
        grad_input = torch.empty_like(zxBCdt)
        grad_z, grad_xBC, grad_dt = grad_input.split(sizes.widths, dim=-1)
        grad_y, _, grad_norm_weight = gated_norm_triton.backward(
            grad_outputs[0].reshape(y.shape).contiguous(),
            y,
            z.flatten(0, 1),
            p.norm_weight,
            scale,
            grad_z.flatten(0, 1),
        )
        grad_convolved = torch.empty_like(convolved)
        grad_dt_bias, grad_A_log, grad_D = _scan_backward(
            grad_y.view(*zxBCdt.shape[:2], sizes.num_heads, -1),
            split_heads(convolved, sizes),
            split_heads(grad_convolved, sizes),
            (raw_dt, grad_dt),
            (dt, decay, states, index),
            p,
        )
        _, grad_conv_weight, grad_conv_bias, _ = causal_conv1d_bwd_function(
            xBC.transpose(1, 2), p.conv_weight[:, 0], p.conv_bias, grad_convolved.transpose(1, 2), index,
            None, None, grad_xBC.transpose(1, 2), False, True,
        )  # fmt: skip
        gradients = MambaParameters(
            grad_conv_weight[:, None], grad_conv_bias, grad_dt_bias, grad_A_log, grad_D, grad_norm_weight
        )
        casted = (grad.to(q.dtype) for grad, q in zip(gradients, p, strict=True))
        return grad_input, None, None, *casted


def _scan_backward(
    grad_y: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
    raw_dt_and_gradient: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Tensor, Tensor, Tensor | None],
    p: MambaParameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the gradients of x, B, C and dt; return those of dt_bias, A_log and D."""
    x, B, C = inputs
    grad_x, grad_B, grad_C = gradients
    raw_dt, grad_dt = raw_dt_and_gradient
    dt, decay, states, index = kept
    scores = _bmm_chunk_fwd(C, B, dt.shape[-1], seq_idx=index, output_dtype=torch.float32)
    grad_states, grad_chunk_decay = gradients_of_states(grad_y, decay, C, states, index)
    gradient_of_inputs(grad_y, dt, decay, B, C, grad_states, p.D.float(), index, grad_x)
    from_states, of_B = gradient_of_B(x, B, grad_states, dt, decay, index)
    from_outputs, of_C = gradient_of_C(grad_y, C, states, decay, index)
    pairs = pair_gradients(x, grad_y, dt, decay, scores, index)
    _bmm_chunk_bwd(C, pairs.scores, residual=from_states, out=grad_B)
    _bmm_chunk_bwd(B, pairs.scores.transpose(-1, -2), residual=from_outputs, out=grad_C)
    grad_dA, grad_scaled_dt = gradients_of_decays(dt, pairs.parts, of_B, of_C, grad_chunk_decay)
    A = -torch.exp(p.A_log.float())
    _, grad_A, grad_dt_bias = _chunk_cumsum_bwd(
        grad_dA, grad_scaled_dt, raw_dt, A, dt_bias=p.dt_bias.float(), dt_softplus=True, ddt=grad_dt
    )
    return grad_dt_bias, grad_A * A, pairs.own.sum((0, 2, 3))


def mamba_core(zxBCdt: Tensor, parameters: MambaParameters, sizes: MambaSizes, segment_ids: Tensor | None) -> Tensor:
    """See ops.mamba_core.mamba_core. States and decays are fp32 while they are made; products run in the input's dtype."""
    index = None if segment_ids is None else segment_indices(segment_ids)
    restrict_to_tuned(sizes.head_dim, sizes.state_size, power_of_two(sizes.chunk_size), zxBCdt.dtype)
    with torch.autocast("cuda", enabled=False):
        return _MambaCore.apply(zxBCdt.contiguous(), sizes, index, *parameters)
