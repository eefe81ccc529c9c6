"""What the fused Mamba-2 core takes from causal-conv1d and mamba-ssm, in plain torch: both need a GPU.

So that a machine without one runs the core as a whole, with our kernels in Triton's interpreter.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotrain.ops.causal_conv1d import causal_conv1d_ref


def causal_conv1d_fwd_function(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None, *_: Any) -> Tensor:
    """Channels first, [B, C, S], with SiLU."""
    return causal_conv1d_ref(x.transpose(1, 2), weight[:, None], bias, segment_ids=seq_idx).transpose(1, 2)


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad: Tensor,
    seq_idx: Tensor | None,
    _1: Any,
    _2: Any,
    out: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Write the gradient of x into `out`."""
    with torch.enable_grad():
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
        y = causal_conv1d_fwd_function(*inputs, seq_idx)
    of_x, of_weight, of_bias = torch.autograd.grad(y, inputs, grad)
    out.copy_(of_x)
    return out, of_weight, of_bias, None


def in_chunks(tensor: Tensor, chunk: int) -> Tensor:
    """Return [B, S, ...] as [B, c, L, ...] with zeros behind the end."""
    missing = -tensor.shape[1] % chunk
    padded = torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], 1)
    return padded.unflatten(1, (-1, chunk))


def chunk_cumsum_fwd(dt: Tensor, A: Tensor, chunk: int, dt_bias: Tensor, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """Return running sums of dt A within chunks and dt, both [B, H, c, L] fp32."""
    assert dt_softplus
    positive = in_chunks(F.softplus(dt.float() + dt_bias), chunk).permute(0, 3, 1, 2)
    return (positive * A[:, None, None]).cumsum(-1), positive.contiguous()


def chunk_cumsum_bwd(
    grad_dA: Tensor, grad_dt: Tensor, dt: Tensor, A: Tensor, dt_bias: Tensor, dt_softplus: bool, ddt: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the gradients by dt A and by dt; write that of the raw dt [B, S, H] into `ddt`."""
    assert dt_softplus
    with torch.enable_grad():
        inputs = [tensor.detach().float().clone().requires_grad_() for tensor in (dt, A, dt_bias)]
        positive = in_chunks(F.softplus(inputs[0] + inputs[2]), grad_dA.shape[-1]).permute(0, 3, 1, 2)
        outputs = positive * inputs[1][:, None, None], positive
    of_dt, of_A, of_bias = torch.autograd.grad(outputs, inputs, (grad_dA, grad_dt))
    ddt.copy_(of_dt)
    return ddt, of_A, of_bias


def bmm_chunk_fwd(a: Tensor, b: Tensor, chunk: int, seq_idx: Tensor | None, output_dtype: torch.dtype) -> Tensor:
    """Return a_i . b_j within chunks, [B, c, G, L, L], 0 across documents."""
    products = torch.einsum("bcign,bcjgn->bcgij", in_chunks(a, chunk), in_chunks(b, chunk))
    if seq_idx is not None:
        ids = in_chunks(seq_idx + 1, chunk)
        products = products * (ids[:, :, None, :, None] == ids[:, :, None, None, :])
    return products.to(output_dtype)


def bmm_chunk_bwd(a: Tensor, grad: Tensor, residual: Tensor, out: Tensor) -> None:
    """Write sum over i of grad_ij a_i, plus the residual, into `out` [B, S, G, N]."""
    sums = torch.einsum("bcgij,bcign->bcjgn", grad, in_chunks(a, grad.shape[-1])).flatten(1, 2)
    out.copy_(sums[:, : a.shape[1]] + residual)


def install() -> None:
    """Let imports of the libraries find these."""

    def module(name: str, **functions: Callable[..., Any]) -> None:
        made = ModuleType(name)
        made.__dict__.update(functions)
        made.__path__ = []
        sys.modules[name] = made
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, made)

    module("causal_conv1d")
    module(
        "causal_conv1d.cpp_functions",
        causal_conv1d_fwd_function=causal_conv1d_fwd_function,
        causal_conv1d_bwd_function=causal_conv1d_bwd_function,
    )
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        module(name)
    triton = "mamba_ssm.ops.triton."
    module(triton + "ssd_bmm", _bmm_chunk_fwd=bmm_chunk_fwd, _bmm_chunk_bwd=bmm_chunk_bwd)
    module(triton + "ssd_chunk_state", _chunk_cumsum_fwd=chunk_cumsum_fwd, _chunk_cumsum_bwd=chunk_cumsum_bwd)
    module(triton + "layernorm_gated", rmsnorm_fn=len)
    module(triton + "ssd_combined", mamba_chunk_scan_combined=len)
    for name in ("ssd_chunk_scan", "ssd_state_passing"):
        module(triton + name)
