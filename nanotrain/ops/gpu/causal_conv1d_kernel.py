"""The package causal-conv1d behind the signature of our op."""

from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]
from torch import Tensor

from nanotrain.ops.segments import segment_indices


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, *, segment_ids: Tensor | None = None) -> Tensor:
    """See ops.causal_conv1d.causal_conv1d; channels stay innermost, so that nothing is transposed in memory."""
    index = None if segment_ids is None else segment_indices(segment_ids)
    if x.stride(1) % 8 or x.stride(2) != 1:
        x = x.contiguous()
    y = causal_conv1d_fn(x.transpose(1, 2), weight[:, 0], bias, seq_idx=index, activation="silu")
    return y.transpose(1, 2)
