"""The mixin that lets Transformer Engine's attention take documents, before a stand-in that insists on what Transformer Engine insists on."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nanotrain.engines.megatron_batch import SequenceSplit
from nanotrain.engines.megatron_documents import ChunkDocuments, attend_documents, chunk_documents
from nanotrain.ops.attention import attention_ref
from tests.engines.megatron_ranks import SMALL

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from nanotrain.engines import megatron_layers, megatron_model


class StandIn(nn.Module):
    """Megatron's TEDotProductAttention of 2.20, as far as it is asked: its demands on documents, and the sums in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.cp_group = "ranks"
        self.plain_calls = 0

    def forward(
        self, query, key, value, attention_mask, *, attn_mask_type, attention_bias=None, packed_seq_params=None
    ):
        assert attention_mask is None and attention_bias is None
        if packed_seq_params is None:
            self.plain_calls += 1
            assert self.cp_group == "ranks"
            return query
        assert self.cp_group is None, "under context parallelism Transformer Engine has no bottom-right mask"
        assert attn_mask_type.name == "padding_causal_bottom_right" and packed_seq_params.qkv_format == "thd"
        for tensor in (query, key, value):
            assert tensor.dim() == 3 and tensor.is_contiguous() and tensor.storage_offset() == 0
        assert key.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
        q, k = packed_seq_params.cu_seqlens_q, packed_seq_params.cu_seqlens_kv
        assert q.dtype == k.dtype == torch.int32 and q.shape == k.shape
        assert (q[-1], k[-1]) == (query.shape[0], key.shape[0]), "tokens outside of all sequences"
        assert packed_seq_params.max_seqlen_q <= packed_seq_params.max_seqlen_kv, (
            "cuDNN's bottom-right masks ask for it"
        )
        assert q.diff().max() <= packed_seq_params.max_seqlen_q and k.diff().max() <= packed_seq_params.max_seqlen_kv
        return attend_documents(query, key, value, ChunkDocuments(0, 0, q, k)).flatten(1)


class RowAttention(megatron_layers.DocumentAttention, StandIn):
    pass


def call(module: RowAttention, query: Tensor, key: Tensor, chunks: tuple[ChunkDocuments, ...] | None) -> Tensor:
    """Call the module as Megatron's SelfAttention does; values are the keys."""
    packed = None if chunks is None else megatron_layers.PackedDocuments(qkv_format="thd", chunks=chunks)
    return module(query, key, key, None, attn_mask_type=SimpleNamespace(name="causal"), packed_seq_params=packed)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("lengths", [[16], [1] * 16, [5, 1, 3, 7]])
def test_a_rank_attends_within_documents(monkeypatch, rank, lengths):
    torch.manual_seed(0)
    query, key = torch.randn(16, 4, 8), torch.randn(16, 1, 8)
    split = SequenceSplit(2, rank)
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    chunks = tuple(chunk_documents(borders, chunk) for chunk in split.chunks(16))
    monkeypatch.setattr(megatron_layers, "gathered_keys_values", lambda *_: torch.cat([key, key], dim=1))
    module = RowAttention()
    got = call(module, split.take(query[None])[0], split.take(key[None])[0], chunks)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    expected = split.take(attention_ref(query[None], key[None], key[None], segment_ids=ids))[0].flatten(1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert module.cp_group == "ranks" and module.plain_calls == 0


def test_plain_rows_go_on_as_they_are():
    module, query = RowAttention(), torch.randn(8, 2, 4, 8)
    assert call(module, query, query, None) is query and module.plain_calls == 1


def test_a_failure_leaves_the_ranks_in_place(monkeypatch):
    monkeypatch.setattr(megatron_layers, "gathered_keys_values", lambda *_: torch.zeros(8, 2, 8))
    module, chunks = RowAttention(), (chunk_documents(torch.tensor([0, 8]), range(8)),)
    with pytest.raises(AssertionError, match="outside"):
        call(module, torch.zeros(7, 1, 8), torch.zeros(7, 1, 8), chunks)
    assert module.cp_group == "ranks"


@pytest.mark.parametrize("context_parallel", [1, 2])
def test_stock_layers_change_under_context_parallelism_only(monkeypatch, context_parallel):
    def holding(**content: object) -> SimpleNamespace:
        return SimpleNamespace(submodules=SimpleNamespace(**content))

    attention = holding(core_attention=StandIn)
    stock = holding(
        mamba_layer=holding(mixer=SimpleNamespace(module="stock", params={})),
        attention_layer=holding(self_attention=attention),
    )
    monkeypatch.setattr(megatron_model, "hybrid_stack_spec", stock)
    spec = megatron_model._stock_spec(SMALL, SimpleNamespace(context_parallel_size=context_parallel)).submodules
    mixer, core = spec.mamba_layer.submodules.mixer, spec.attention_layer.submodules.self_attention.submodules
    assert mixer.params == {"chunk_size": SMALL.chunk_size, "d_conv": SMALL.conv_kernel}
    if context_parallel == 1:
        assert mixer.module == "stock" and core.core_attention is StandIn
    else:
        assert mixer.module is megatron_layers.RowMambaMixer
        query = torch.randn(8, 2, 4, 8)
        assert call(core.core_attention(), query, query, None) is query
    assert attention.submodules.core_attention is StandIn, "Megatron's own description is left alone"
