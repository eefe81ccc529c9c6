"""Attention within documents of a packed row that context-parallel ranks share.

A rank has the queries of two chunks of the row, wherever documents begin in them, and gathers all keys and values: grouped-query attention
has few of them (Llama 3, arXiv:2407.21783, section 3.3.2, does so for its document masks). A chunk needs the keys from the start of the document
that it begins in to its own end, so that every document in it is a sequence whose last query sees its last key: a causal mask aligned
at the bottom right, which kernels for sequences of different lengths know.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nanotrain.ops.attention import attention


@dataclass(frozen=True)
class ChunkDocuments:
    """The documents that a chunk of a packed row has queries of.

    Attributes:
        first_key: position in the row of the first key that any of these queries sees.
        end: position behind the chunk's last query, and behind its last key.
        cu_seqlens_q: [documents + 1] int32, where their queries start, counted from the chunk's first, and the end.
        cu_seqlens_kv: [documents + 1] int32, where their keys start, counted from `first_key`, and the end.
    """

    first_key: int
    end: int
    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor

    def to(self, device: torch.device) -> "ChunkDocuments":
        """Return the same with tensors on `device`."""
        moved = (t.to(device, non_blocking=True) for t in (self.cu_seqlens_q, self.cu_seqlens_kv))
        return ChunkDocuments(self.first_key, self.end, *moved)


Kernel = Callable[[Tensor, Tensor, Tensor, ChunkDocuments], Tensor]
"""Maps queries [S, Hq, Dh] of a chunk, keys and values [T, Hkv, Dh] to [S, ...]; T = `end` - `first_key`."""


def chunk_documents(borders: Tensor, chunk: range) -> ChunkDocuments:
    """Return the documents of a chunk.

    Args:
        borders: [documents + 1] integer, of the whole row: where documents start, and the row's end.
        chunk: positions of the row, at least one.
    """
    begin, end = chunk.start, chunk.stop
    positions = borders.tolist()
    first = max(i for i, border in enumerate(positions) if border <= begin)
    last = min(i for i, border in enumerate(positions) if border >= end)
    edges = borders[first : last + 1]
    first_key = positions[first]
    cu_seqlens_q, cu_seqlens_kv = edges.clamp(begin, end) - begin, edges.clamp(max=end) - first_key
    return ChunkDocuments(first_key, end, cu_seqlens_q.to(torch.int32), cu_seqlens_kv.to(torch.int32))


def attend_chunks(query: Tensor, keys_values: Tensor, chunks: Sequence[ChunkDocuments], kernel: Kernel) -> Tensor:
    """Return causal attention within documents for one rank's queries.

    Args:
        query: [S / CP, Hq, Dh], the rank's chunks one after another.
        keys_values: [S, 2 Hkv, Dh], the keys of the whole row in order, then its values.
        chunks: their documents, chunk by chunk; chunks have one length.
        kernel: attends within the documents of a chunk.

    Returns:
        [S / CP, ...], what the kernel returns, chunk after chunk.
    """
    outputs = []
    for q, documents in zip(query.chunk(len(chunks)), chunks, strict=True):
        k, v = keys_values[documents.first_key : documents.end].chunk(2, dim=1)
        outputs.append(kernel(q, k, v, documents))
    return torch.cat(outputs)


def attend_documents(q: Tensor, k: Tensor, v: Tensor, documents: ChunkDocuments) -> Tensor:
    """Attend document by document, in plain torch: the twin of a GPU's kernel for sequences of different lengths.

    Args:
        q: [S, Hq, Dh].
        k: [T, Hkv, Dh].
        v: [T, Hkv, Dh].
        documents: their borders.

    Returns:
        [S, Hq, Dh].
    """
    outputs = []
    edges = zip(documents.cu_seqlens_q.tolist(), documents.cu_seqlens_kv.tolist(), strict=True)
    for (q_start, k_start), (q_end, k_end) in pairwise(edges):
        earlier = torch.tensor([(k_end - k_start) - (q_end - q_start)], device=q.device)
        keys, values = k[None, k_start:k_end], v[None, k_start:k_end]
        outputs.append(attention(q[None, q_start:q_end], keys, values, num_cached=earlier)[0])
    return torch.cat(outputs)
