"""The name table: round trips under every layout, and the cuts checked against the published facts by other arithmetic."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanotrain.checkpoint.hf_folder import load_state_dict, open_checkpoint, save_state_dict, write_description
from nanotrain.checkpoint.tensor_files import plan_files, write_files, write_index
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ModelConfig
from nanotrain.engines.megatron_names import (
    Source,
    find_source,
    in_file_order,
    ranges_of,
    shard_shape,
    stage_sources,
    to_hf,
    to_megatron,
)
from nanotrain.planning.parameters import count_parameters, tensor_shapes
from nanotrain.planning.pipeline_stages import stage_layers

SMALL = ModelConfig(
    hybrid_layer_pattern="M-M*-M",
    vocab_size=61,
    hidden_size=16,
    intermediate_size=40,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=3,
    mamba_num_heads=16,
    mamba_head_dim=5,
    ssm_state_size=7,
    n_groups=8,
)


def numbered(config: ModelConfig, device: str = "cpu") -> dict[str, Tensor]:
    """Every element of every tensor is another number."""
    tensors, first = {}, 0
    for name, shape in tensor_shapes(config).items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + size, device=device).view(shape)
        first += size
    return tensors


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("stages", [[6], [3, 3], [1, 2, 3], [2, 2, 1, 1], [1, 1, 1, 1, 1, 1]])
def test_round_trip_is_exact_in_every_layout(tp_size: int, stages: list[int]) -> None:
    tensors = numbered(SMALL)
    read = ranges_of(tensors)
    megatron = MegatronConfig(pipeline_parallel=len(stages), pipeline_layers=stages)
    restored: dict[str, Tensor] = {}
    for layers in stage_layers(SMALL.num_hidden_layers, megatron):
        for name, source in stage_sources(SMALL, layers, fused_norms=len(stages) % 2 == 0).items():
            assert find_source(SMALL, name, layers.start) == source
            shards = [to_megatron(SMALL, source, read, tp_rank=r, tp_size=tp_size) for r in range(tp_size)]
            assert {tuple(shard.shape) for shard in shards} == {shard_shape(SMALL, source, tp_size)}
            part = to_hf(SMALL, source, shards)
            assert not part.keys() & restored.keys()
            restored |= part
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("size", ["12b", "9b"])
@pytest.mark.parametrize("tp_size", [1, 8])
def test_published_shapes_and_counts(published: Callable[[str], ModelConfig], size: str, tp_size: int) -> None:
    config = published(size)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(config).items()}
    read = ranges_of(tensors)
    total, restored = 0, {}
    for layers in stage_layers(config.num_hidden_layers, MegatronConfig(pipeline_parallel=4)):
        for source in stage_sources(config, layers, fused_norms=True).values():
            shards = [to_megatron(config, source, read, tp_rank=r, tp_size=tp_size) for r in range(tp_size)]
            total += sum(shard.numel() for shard in (shards if source.dim is not None else shards[:1]))
            restored |= {name: tuple(tensor.shape) for name, tensor in to_hf(config, source, shards).items()}
    assert total == count_parameters(config)
    assert restored == tensor_shapes(config)


def test_published_rows_of_in_proj_and_convolution_at_tp_8(published: Callable[[str], ModelConfig]) -> None:
    """Section 10.4 of the facts about the 12B: 1280 + 1280 + 128 + 128 + 16 rows a rank, 1280 + 128 + 128 channels."""
    config = published("12b")
    rows = torch.arange(22656)[:, None]
    source = find_source(config, "decoder.layers.0.mixer.in_proj.weight")
    held = to_megatron(config, source, lambda _, dim, r: ranges_of({"": rows})("", dim, r), tp_rank=3, tp_size=8)
    parts = held[:, 0].split([1280, 1280, 128, 128, 16])
    assert [int(part[0]) for part in parts] == [3 * 1280, 10240 + 3 * 1280, 20480 + 384, 21504 + 384, 22528 + 48]
    assert all(torch.equal(part, torch.arange(len(part)) + part[0]) for part in parts)
    source = find_source(config, "decoder.layers.0.mixer.conv1d_bias")
    held = to_megatron(config, source, lambda _, d, r: ranges_of({"": rows[:, 0]})("", d, r), tp_rank=7, tp_size=8)
    parts = held.split([1280, 128, 128])
    assert [int(part[0]) for part in parts] == [7 * 1280, 10240 + 7 * 128, 11264 + 7 * 128]


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_query_key_value_lie_group_by_group(tp_size: int) -> None:
    """As megatron-core's attention cuts its projection: [groups, heads a group + 2, head_dim]."""
    tensors = numbered(SMALL)
    source = find_source(SMALL, "decoder.layers.3.self_attention.linear_qkv.weight")
    for rank in range(tp_size):
        held = to_megatron(SMALL, source, ranges_of(tensors), tp_rank=rank, tp_size=tp_size)
        heads = held.view(8 // tp_size, 4, 3, 16)
        for local, group in enumerate(range(rank * 8 // tp_size, (rank + 1) * 8 // tp_size)):
            prefix = "backbone.layers.3.mixer"
            query = tensors[f"{prefix}.q_proj.weight"].view(16, 3, 16)[2 * group : 2 * group + 2]
            assert torch.equal(heads[local, :2], query)
            assert torch.equal(heads[local, 2], tensors[f"{prefix}.k_proj.weight"].view(8, 3, 16)[group])
            assert torch.equal(heads[local, 3], tensors[f"{prefix}.v_proj.weight"].view(8, 3, 16)[group])


def test_vocabulary_is_padded_with_zero_rows_at_the_end() -> None:
    tensors = numbered(SMALL)
    source = find_source(SMALL, "output_layer.weight")
    shards = [to_megatron(SMALL, source, ranges_of(tensors), tp_rank=r, tp_size=8) for r in range(8)]
    assert [len(shard) for shard in shards] == [8] * 8
    assert torch.equal(torch.cat(shards)[:61], tensors["lm_head.weight"])
    assert not torch.cat(shards)[61:].any()


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.6.norm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mixer.in_proj._extra_state",
        "position_embeddings.weight",
    ],
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(KeyError):
        find_source(SMALL, name)


@pytest.mark.parametrize("tp_size", [1, 8])
def test_folders_stream_in_and_out_part_by_part(tmp_path: Path, tp_size: int) -> None:
    """Each rank reads its own cuts from the files in their order; each stage writes its own files."""
    state = {name: torch.randn(shape).bfloat16() for name, shape in tensor_shapes(SMALL).items()}
    save_state_dict(state, SMALL, tmp_path / "hf", max_shard_bytes=4000)
    sizes = {name: tensor.nbytes for name, tensor in state.items()}
    stages = [
        stage_sources(SMALL, layers, fused_norms=False)
        for layers in stage_layers(SMALL.num_hidden_layers, MegatronConfig(pipeline_parallel=3))
    ]
    plan = plan_files(sizes, 4000, starts=[next(iter(stage.values())).hf_names[0] for stage in stages])
    (tmp_path / "again").mkdir()
    write_index(plan, sizes, tmp_path / "again")
    write_description(tmp_path / "again", SMALL, torch.bfloat16, None, None)
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        for stage in reversed(stages):
            read_from = []
            shards: dict[str, list[Tensor]] = {name: [] for name in stage}
            for rank in range(tp_size):
                for name, source in in_file_order(stage, checkpoint.stored_names):
                    read_from.append(list(checkpoint.stored_names).index(source.hf_names[0]))
                    held = to_megatron(SMALL, source, checkpoint.read, tp_rank=rank, tp_size=tp_size)
                    shards[name].append(held)
            assert read_from == sorted(set(read_from)) * tp_size
            write_files(plan, _gathered(stage, shards), tmp_path / "again")
    again = load_state_dict(tmp_path / "again")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def _gathered(stage: dict[str, Source], shards: dict[str, list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, source in stage.items():
        yield from to_hf(SMALL, source, shards[name]).items()
