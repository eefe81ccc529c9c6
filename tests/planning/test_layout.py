"""Layouts: each refusal names its rule and layouts that work, what is accepted can be cut, what is proposed is accepted."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.config.engine import EngineConfig, EngineKind, Precision
from nanotrain.config.errors import UserError
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.engines.megatron_names import ranges_of, shard_shape, stage_sources, to_megatron
from nanotrain.planning.layout import Layout, check_layout, check_ranks, nearest_layouts, with_layout
from nanotrain.planning.parameters import tensor_shapes
from nanotrain.planning.pipeline_stages import layers_per_stage, stage_layers

PUBLISHED = TrainingConfig(
    steps=1, global_batch_size=736, micro_batch_size=1, sequence_length=8192, learning_rate=4.5e-4
)
LONG = replace(PUBLISHED, global_batch_size=12, sequence_length=524288)


def engine(precision: Precision = Precision.fp8_blockwise, **megatron: object) -> EngineConfig:
    return EngineConfig(kind=EngineKind.megatron, precision=precision, megatron=MegatronConfig(**megatron))


def test_published_layouts_are_accepted(published: Callable[[str], ModelConfig]) -> None:
    large = engine(tensor_parallel=8, pipeline_parallel=4, sequence_parallel=True)
    assert check_layout(published("12b"), PUBLISHED, large, 1024) == Layout(8, 4, 1, 32)
    long = engine(tensor_parallel=8, context_parallel=16, sequence_parallel=True)  # as published
    assert check_layout(published("12b"), LONG, long, 128) == Layout(8, 1, 16, 1)
    assert check_layout(published("12b"), LONG, long, 1536) == Layout(8, 1, 16, 12)


@pytest.mark.parametrize(
    ("size", "training", "settings", "world_size", "message"),
    [
        ("12b", {}, {"tensor_parallel": 16}, 16, r"tensor_parallel` \(16\) must divide the model's `n_groups` \(8\)"),
        (
            "9b",
            {},
            {"tensor_parallel": 8},
            8,
            r"tensor_parallel` \(8\) leaves each rank 1960 of the model's `intermediate_size` \(15680\).*multiple of 16"
            r".*what works: 8 ranks with tensor_parallel=4 pipeline_parallel=1 context_parallel=1 \(data-parallel 2\)"
            r".*or set `engine.precision` to bf16",
        ),
        (
            "12b",
            {"sequence_length": 524288, "global_batch_size": 12},
            {"tensor_parallel": 8, "context_parallel": 32},
            256,
            r"context_parallel` \(32\) x `tensor_parallel` \(8\) must divide the model's `mamba_num_heads` \(128\)"
            r".*256 ranks with tensor_parallel=4 pipeline_parallel=1 context_parallel=32 \(data-parallel 2\)"
            r" or 256 ranks with tensor_parallel=8 pipeline_parallel=1 context_parallel=16 ",
        ),
        (
            "12b",
            {"sequence_length": 8200},
            {"context_parallel": 4, "tensor_parallel": 2, "sequence_parallel": True},
            8,
            r"sequence_length` \(8200\) must be a multiple of 64 for `engine.precision` \(fp8_blockwise\)"
            r".*set `stage.training.sequence_length` to 8192 or 8256",
        ),
        ("12b", {}, {"pipeline_parallel": 63}, 63, r"pipeline_parallel` \(63\) must not exceed the model's layers"),
        (
            "12b",
            {},
            {"pipeline_parallel": 2, "pipeline_layers": [30, 31]},
            2,
            r"pipeline_layers` \(\[30, 31\]\).*the sum is 61; what works: 2 ranks with tensor_parallel=1"
            r" pipeline_parallel=2 context_parallel=1 pipeline_layers=\[\].*leave it empty for \[31, 31\]",
        ),
        (
            "12b",
            {},
            {"tensor_parallel": 8},
            12,
            r"= 8 must divide the number of ranks \(12\); what works: 12 ranks with tensor_parallel=4",
        ),
        (
            "12b",
            {},
            {"tensor_parallel": 8},
            1000,
            r"global_batch_size` \(736\) must be divisible by `micro_batch_size` \(1\) x 125 data-parallel ranks;"
            r" what works: 736 ranks with tensor_parallel=8 pipeline_parallel=1 context_parallel=1 \(data-parallel 92\)"
            r" or 1472 ranks with tensor_parallel=8 pipeline_parallel=1 .*"
            r"set `stage.training.global_batch_size` to 625 or 750",
        ),
        (
            "12b",
            {"global_batch_size": 1},
            {"tensor_parallel": 8},
            67,
            r"what works: 64 ranks with tensor_parallel=8 pipeline_parallel=8 .* or 72 ranks with tensor_parallel=8 ",
        ),
    ],
)
def test_refusals_name_key_value_rule_and_ways_out(
    published: Callable[[str], ModelConfig],
    size: str,
    training: dict[str, int],
    settings: dict[str, object],
    world_size: int,
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(published(size), replace(PUBLISHED, **training), engine(**settings), world_size)


def test_tied_embeddings_are_refused(published: Callable[[str], ModelConfig]) -> None:
    with pytest.raises(UserError, match=r"`tie_word_embeddings` is true; train it with engine=torch"):
        check_layout(replace(published("12b"), tie_word_embeddings=True), PUBLISHED, engine(), 1)


@pytest.mark.parametrize(
    ("layers", "stages", "lengths"),
    [(62, 4, [15, 16, 16, 15]), (62, 3, [21, 21, 20]), (7, 4, [2, 2, 2, 1]), (5, 5, [1] * 5), (5, 2, [3, 2])],
)
def test_even_stages(layers: int, stages: int, lengths: list[int]) -> None:
    assert layers_per_stage(layers, MegatronConfig(pipeline_parallel=stages)) == lengths


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, TrainingConfig, EngineConfig, int]:
    groups = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    key_value = draw(st.sampled_from([1, 2, 4, 8]))
    model = ModelConfig(
        hybrid_layer_pattern=draw(st.text("M*-", min_size=1, max_size=9)),
        vocab_size=draw(st.integers(1, 70)),
        hidden_size=draw(st.sampled_from([8, 16, 32])),
        intermediate_size=draw(st.sampled_from([24, 32, 64, 120])),
        num_attention_heads=key_value * draw(st.integers(1, 3)),
        num_key_value_heads=key_value,
        head_dim=draw(st.sampled_from([4, 8, 16])),
        mamba_num_heads=groups * draw(st.sampled_from([1, 2, 3, 4])),
        mamba_head_dim=draw(st.sampled_from([2, 8, 16])),
        ssm_state_size=draw(st.sampled_from([2, 16])),
        n_groups=groups,
    )
    training = replace(
        PUBLISHED,
        global_batch_size=draw(st.integers(1, 24)),
        micro_batch_size=draw(st.sampled_from([1, 1, 1, 2])),
        sequence_length=draw(st.sampled_from([30, 32, 64, 96, 256])),
    )
    tensor = draw(st.sampled_from([1, 2, 3, 4, 8]))
    pipeline = draw(st.integers(1, 4))
    lengths = draw(st.one_of(st.just([]), st.lists(st.integers(0, 4), min_size=pipeline, max_size=pipeline)))
    chosen = engine(
        draw(st.sampled_from([Precision.bf16, Precision.fp8_blockwise])),
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        pipeline_layers=lengths,
        context_parallel=draw(st.sampled_from([1, 1, 2, 3, 4])),
        sequence_parallel=tensor > 1 and draw(st.booleans()),
    )
    return model, training, chosen, draw(st.integers(1, 64))


@given(cases())
@settings(max_examples=80, deadline=None)
def test_what_is_accepted_can_be_cut_and_what_is_proposed_is_accepted(
    case: tuple[ModelConfig, TrainingConfig, EngineConfig, int],
) -> None:
    model, training, chosen, world_size = case
    try:
        layout = check_layout(model, training, chosen, world_size)
    except UserError:
        for proposal in nearest_layouts(model, training, chosen, world_size):
            changed = with_layout(model, chosen, proposal)
            assert check_layout(model, training, changed, proposal.world_size) == proposal
        return
    assert layout.world_size == world_size
    assert training.global_batch_size % (layout.data * training.micro_batch_size) == 0
    read = ranges_of({name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(model).items()})
    names = []
    for layers in stage_layers(model.num_hidden_layers, chosen.megatron):
        for source in stage_sources(model, layers, fused_norms=True).values():
            names += source.hf_names
            part = to_megatron(model, source, read, tp_rank=layout.tensor - 1, tp_size=layout.tensor)
            assert tuple(part.shape) == shard_shape(model, source, layout.tensor)
    assert names == list(tensor_shapes(model))


def test_a_batch_is_checked_before_the_model_is_known():
    engine = EngineConfig(kind=EngineKind.megatron, megatron=MegatronConfig(tensor_parallel=2))
    training = replace(PUBLISHED, global_batch_size=12)
    check_ranks([], training, engine, 8)
    with pytest.raises(UserError, match=r"to 8 or 16, or use 6 or 12 data-parallel ranks"):
        check_ranks([], training, engine, 16)
    with pytest.raises(UserError, match=r"= 2 must divide the number of ranks \(5\); start 4 or 6 ranks"):
        check_ranks([], training, engine, 5)
    with pytest.raises(UserError, match=r"\(1\); start 2 ranks"):
        check_ranks([], training, engine, 1)
