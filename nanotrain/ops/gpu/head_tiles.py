"""Tiles of single heads that Hopper's copy engine (TMA) moves: no thread computes their addresses or waits for them."""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanotrain.ops.gpu.ssd_scan_triton import NARROW, has_hoppers_shared_memory

_BYTES = 16
"""The copy engine wants addresses and strides that are multiples of this."""


def head_tiles(values: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return the descriptor of values [B, S, H, P] as [B, H, S, P] for tiles of some positions of one head.

    Outside of them zeros are read, and nothing is written.
    """
    values = values.transpose(1, 2)
    return TensorDescriptor(values, list(values.shape), list(values.stride()), [1, 1, rows, columns])


def can_be_copied(chunk: int, *values: Tensor) -> bool:
    """Return whether tiles of values [B, S, H, P] of a chunk should be moved so: of 2-byte numbers, and none narrow."""
    return chunk >= NARROW and all(_can_be_copied(t) for t in values)


def _can_be_copied(values: Tensor) -> bool:
    size = values.element_size()
    aligned = values.data_ptr() % _BYTES == 0 and all(s * size % _BYTES == 0 for s in values.stride()[:-1])
    return size == 2 and aligned and values.shape[-1] >= NARROW and has_hoppers_shared_memory(values.device)
