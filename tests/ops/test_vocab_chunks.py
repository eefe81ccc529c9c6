"""The parts of the chunked losses against plain indexing and whole products."""

import pytest
import torch

from nanotrain.ops import vocab_chunks
from nanotrain.ops.vocab_shard import VocabShard


@pytest.mark.parametrize("kept", [0, 1, 5, 12])
def test_select_and_scatter_are_boolean_indexing(kept):
    mask = (torch.randperm(12, generator=torch.Generator().manual_seed(0)) < kept).view(3, 4)
    tensor = torch.randn(3, 4, 5)
    rows = vocab_chunks.select_rows(tensor, mask)
    assert torch.equal(rows, tensor[mask])
    assert torch.equal(vocab_chunks.scatter_rows(rows, mask), tensor * mask[..., None])
    positions = mask.flatten().nonzero()[:, 0]
    assert torch.equal(vocab_chunks.take_rows(tensor, positions), rows)
    assert torch.equal(vocab_chunks.put_rows(rows, positions, mask.shape), tensor * mask[..., None])


def test_chunks_hold_the_memory_budget_and_never_nothing():
    for vocabulary in (64, 4096, 131072, 10**9):
        tokens = vocab_chunks.default_chunk_tokens(torch.empty(vocabulary, 1, device="meta").to("meta"))
        assert tokens >= 16
        assert tokens == 16 or tokens * vocabulary <= vocab_chunks.GPU_LOGITS_PER_CHUNK
    assert vocab_chunks.default_chunk_tokens(torch.empty(8192, 1)) == 512


def test_dtypes_follow_autocast_but_never_touch_fp64():
    hidden, weight = torch.ones(2, 3), torch.ones(4, 3)
    assert vocab_chunks.product_dtype(hidden, weight) == torch.float32
    assert vocab_chunks.product_dtype(hidden.bfloat16(), weight) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert vocab_chunks.product_dtype(hidden, weight) == torch.bfloat16
        assert vocab_chunks.product_dtype(hidden.double(), weight.double()) == torch.float64
    assert vocab_chunks.accumulation_dtype(torch.bfloat16) == torch.float32
    assert vocab_chunks.accumulation_dtype(torch.float64) == torch.float64
    assert vocab_chunks.widened(hidden.bfloat16() @ weight.bfloat16().t()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_of_chunks_add_up_in_the_dtype_of_the_total(dtype):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(16, 6, generator=generator).to(dtype) for _ in range(64)]
    hidden = [torch.randn(16, 3, generator=generator).to(dtype) for _ in range(64)]
    total = torch.full((6, 3), float("nan"))  # the first chunk overwrites it
    for index, (grad, states) in enumerate(zip(grads, hidden, strict=True)):
        vocab_chunks.accumulate_weight_gradient(total, grad, states, first=index == 0)
    exact = torch.cat(grads).double().t() @ torch.cat(hidden).double()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3  # one rounding of each chunk's product
    assert float((total - exact).abs().max() / exact.abs().max()) < tolerance


def test_reductions_go_through_the_shard():
    shard = VocabShard(0, lambda t: t + 1, lambda t: t * 2)
    values = torch.tensor([3.0])
    assert vocab_chunks.all_reduce_max(values, shard) == 4 and vocab_chunks.all_reduce_sum(values, shard) == 6
    assert vocab_chunks.all_reduce_max(values, None) is values and vocab_chunks.all_reduce_sum(values, None) is values


def test_local_labels_of_a_shard():
    labels = torch.tensor([3, 9, 10, 14, 15])
    local, is_local = vocab_chunks.local_labels(labels, 5, VocabShard(10, lambda t: t, lambda t: t))
    assert is_local.tolist() == [False, False, True, True, False]
    assert local[is_local].tolist() == [0, 4] and int(local.min()) >= 0 and int(local.max()) < 5
    assert vocab_chunks.local_labels(labels, 20, None) == (labels, None)
