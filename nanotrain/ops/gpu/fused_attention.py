"""Causal attention through the fused kernels that come with PyTorch: cuDNN for whole rows, flash for packed documents."""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from nanotrain.ops.segments import segment_indices

_OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Causal attention of [B, S, H, Dh] in bf16 or fp16; key heads are not repeated in memory."""
    return _attention(q, k, v, segment_ids, SDPBackend.CUDNN_ATTENTION)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor | None) -> Tensor:
    """As `cudnn_attention`, with PyTorch's flash attention for whole rows too."""
    return _attention(q, k, v, segment_ids, SDPBackend.FLASH_ATTENTION)


def _attention(q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor | None, backend: SDPBackend) -> Tensor:
    if segment_ids is not None:
        return _packed(q, k, v, segment_ids)
    with sdpa_kernel(
        [backend, *(other for other in _OTHERS if other is not backend)], set_priority=True
    ):  # the others for shapes that it does not take
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
        )
    return y.transpose(1, 2)


def _packed(q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor) -> Tensor:
    """Attention within documents only: rows are laid end to end, and every document is a sequence of its own."""
    offsets = _document_offsets(segment_ids)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    length = q.shape[1]
    y = varlen_attn(*flat, offsets, offsets, length, length, window_size=(-1, 0))
    assert isinstance(y, Tensor)
    return y.view(q.shape)


_offsets: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}


def _document_offsets(segment_ids: Tensor) -> Tensor:
    """Return where documents begin in the flattened rows, and the total: int32 [documents + 1].

    Their number is read from the device, which waits for it; so it is kept for the other attention layers of the same
    forward pass.
    """
    known = _offsets.get(id(segment_ids))
    if known is not None and known[0]() is segment_ids:
        return known[1]
    index = segment_indices(segment_ids)
    begins = torch.ones_like(index, dtype=torch.bool)
    begins[:, 1:] = index[:, 1:] != index[:, :-1]
    starts = begins.flatten().nonzero()[:, 0].to(torch.int32)
    offsets = torch.cat([starts, starts.new_tensor([index.numel()])])
    _offsets.clear()
    _offsets[id(segment_ids)] = (weakref.ref(segment_ids), offsets)
    return offsets
