"""Documents of a packed row split over context-parallel ranks: which keys a chunk sees, and attention over all ranks in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanotrain.engines.megatron_batch import SequenceSplit
from nanotrain.engines.megatron_documents import ChunkDocuments, attend_chunks, attend_documents, chunk_documents
from nanotrain.ops.attention import attention_ref


def seen(documents: ChunkDocuments, begin: int) -> set[tuple[int, int]]:
    """Return (query, key) positions that a causal mask aligned at the bottom right of every document lets through."""
    queries, keys = documents.cu_seqlens_q.tolist(), documents.cu_seqlens_kv.tolist()
    pairs = set()
    for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:], strict=False):
        for i in range(q1 - q0):
            for j in range(k1 - k0):
                if j <= i + (k1 - k0) - (q1 - q0):
                    pairs.add((begin + q0 + i, documents.first_key + k0 + j))
    return pairs


def brute_force(document_of: list[int], chunk: range) -> set[tuple[int, int]]:
    return {(q, k) for q in chunk for k in range(q + 1) if document_of[k] == document_of[q]}


def borders_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_a_chunk_sees_its_documents_up_to_each_query(lengths: list[int], data: st.DataObject) -> None:
    total = sum(lengths)
    begin = data.draw(st.integers(0, total - 1))
    chunk = range(begin, data.draw(st.integers(begin + 1, total)))
    document_of = [number for number, length in enumerate(lengths) for _ in range(length)]
    documents = chunk_documents(borders_of(lengths), chunk)
    assert seen(documents, begin) == brute_force(document_of, chunk)
    q, k = documents.cu_seqlens_q, documents.cu_seqlens_kv
    assert q.dtype == k.dtype == torch.int32 and q.shape == k.shape
    assert q[0] == k[0] == 0 and q[-1] == len(chunk) and k[-1] == documents.end - documents.first_key
    assert (q.diff() > 0).all(), "a document without queries would waste a sequence"
    assert (k.diff() >= q.diff()).all()


@pytest.mark.parametrize(
    ("lengths", "chunk", "first_key", "queries", "keys"),
    [
        ([8], range(4, 6), 0, [0, 2], [0, 6]),  # one document over all
        ([1] * 8, range(4, 6), 4, [0, 1, 2], [0, 1, 2]),  # documents of one token
        ([3, 5], range(2, 4), 0, [0, 1, 2], [0, 3, 4]),  # the border inside: the first document from its start
        ([4, 4], range(4, 6), 4, [0, 2], [0, 2]),  # the border at the chunk's start: nothing before it
        ([6, 2], range(4, 6), 0, [0, 2], [0, 6]),  # the border at the chunk's end: nothing behind it
    ],
)
def test_by_hand(lengths, chunk, first_key, queries, keys):
    documents = chunk_documents(borders_of(lengths), chunk)
    assert (documents.first_key, documents.end) == (first_key, chunk.stop)
    assert documents.cu_seqlens_q.tolist() == queries and documents.cu_seqlens_kv.tolist() == keys


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "lengths",
    [[24], [1] * 24, [5, 1, 11, 7], [3, 3, 6, 12], [23, 1]],
    ids=["one", "single", "crossing", "fitting", "tail"],
)
def test_all_ranks_together_attend_like_one(size, lengths):
    """Against fp64 one query at a time: outputs, and gradients summed over ranks as the reduction over them does."""
    generator = torch.Generator().manual_seed(size)
    query, key, value, upstream = (
        torch.randn(24, heads, 6, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)
    )
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    whole = [t[None].clone().requires_grad_() for t in (query, key, value)]
    expected = attention_ref(*whole, segment_ids=ids)[0]
    expected.backward(upstream)

    splits = [SequenceSplit(size, rank) for rank in range(size)]
    inputs = [t.clone().requires_grad_() for t in (query, key, value)]
    keys_values = torch.cat(inputs[1:], dim=1)
    outputs = []
    for split in splits:
        chunks = [chunk_documents(borders_of(lengths), chunk) for chunk in split.chunks(24)]
        outputs.append(attend_chunks(split.take(inputs[0][None])[0], keys_values, chunks, attend_documents))
    joined = splits[0].join([output[None] for output in outputs])[0]
    joined.backward(upstream)
    torch.testing.assert_close(joined, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(inputs, whole, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad[0], rtol=1e-12, atol=1e-12)
