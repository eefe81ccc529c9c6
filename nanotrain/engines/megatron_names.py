"""NemotronH's tensors on disk <-> the parameters of megatron-core's HybridModel, under every TP and PP layout.

Names on Megatron's side are those of a rank's own `named_parameters()`: layers are counted from the stage's first one.
Nothing here imports megatron-core. Checked against megatron-core 0.19.2: transformer/attention.py (linear_qkv),
ssm/mamba_mixer.py (partition_sizes of in_proj and the convolution).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanotrain.config.model import ATTENTION, MAMBA, MLP, ModelConfig
from nanotrain.planning.parameters import mixer_shapes
from nanotrain.planning.pipeline_stages import padded_vocab_size

ReadRanges = Callable[[str, int, Sequence[tuple[int, int]]], Tensor]
"""(name on disk, dimension, [start, stop) ranges along it) -> those parts, one after the other along that dimension."""

EMBEDDINGS, FINAL_NORM, HEAD = "embedding.word_embeddings.weight", "decoder.final_norm.weight", "output_layer.weight"
_OUTSIDE_LAYERS = {
    EMBEDDINGS: "backbone.embeddings.weight",
    FINAL_NORM: "backbone.norm_f.weight",
    HEAD: "lm_head.weight",
}
_MIXERS: dict[str, dict[str, tuple[str, ...]]] = {
    MAMBA: {
        "mixer.in_proj.weight": ("in_proj.weight",),
        "mixer.conv1d_weight": ("conv1d.weight",),
        "mixer.conv1d_bias": ("conv1d.bias",),
        "mixer.A_log": ("A_log",),
        "mixer.D": ("D",),
        "mixer.dt_bias": ("dt_bias",),
        "mixer.norm.weight": ("norm.weight",),
        "mixer.out_proj.weight": ("out_proj.weight",),
    },
    ATTENTION: {
        "self_attention.linear_qkv.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
        "self_attention.linear_proj.weight": ("o_proj.weight",),
    },
    MLP: {
        "mlp.linear_fc1.weight": ("up_proj.weight",),
        "mlp.linear_fc2.weight": ("down_proj.weight",),
    },
}
_FUSED_NORM = {
    MAMBA: "mixer.in_proj.layer_norm_weight",
    ATTENTION: "self_attention.linear_qkv.layer_norm_weight",
    MLP: "mlp.linear_fc1.layer_norm_weight",
}
"""Transformer Engine's LayerNormColumnParallelLinear holds the norm before it."""
_UNFUSED_NORM = {MAMBA: "norm.weight", ATTENTION: "input_layernorm.weight", MLP: "pre_mlp_layernorm.weight"}
_ROW_PARALLEL = ("out_proj.weight", "o_proj.weight", "down_proj.weight")
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_HF_MIXER_NAME = re.compile(r"backbone\.layers\.(\d+)\.mixer\.(.+)")


@dataclass(frozen=True)
class Source:
    """Where one Megatron parameter lies in NemotronH's tensors.

    Attributes:
        hf_names: one tensor; or query, key and value, which Megatron weaves together KV group by KV group.
        dim: along which tensor-parallel ranks split; None = every rank has all of it.
        blocks: for each tensor the sizes along `dim` of the parts that are each split evenly between the ranks.
    """

    hf_names: tuple[str, ...]
    dim: int | None
    blocks: tuple[tuple[int, ...], ...]


def stage_sources(config: ModelConfig, layers: range, *, fused_norms: bool) -> dict[str, Source]:
    """Return every parameter of one pipeline stage, in the order of the model.

    Args:
        config: the whole model; untied embeddings.
        layers: the stage's global layer indices; the first and last stage also have what is outside the layers.
        fused_norms: Transformer Engine's names of the norms before the mixers, else those of separate modules.
    """
    assert not config.tie_word_embeddings, "Megatron's stages do not share one matrix here"
    norms = _FUSED_NORM if fused_norms else _UNFUSED_NORM
    names = [EMBEDDINGS] if layers.start == 0 else []
    for local, layer in enumerate(layers):
        kind = config.hybrid_layer_pattern[layer]
        names += [f"decoder.layers.{local}.{suffix}" for suffix in (norms[kind], *_MIXERS[kind])]
    if layers.stop == config.num_hidden_layers:
        names += [FINAL_NORM, HEAD]
    return {name: find_source(config, name, layers.start) for name in names}


def find_source(config: ModelConfig, name: str, first_layer: int = 0) -> Source:
    """Return where the parameter `name` of the stage that starts at `first_layer` lies on disk.

    Raises:
        KeyError: Megatron has no such parameter for this architecture.
    """
    if name in _OUTSIDE_LAYERS:
        hf_names = (_OUTSIDE_LAYERS[name],)
    else:
        match = _LAYER_NAME.fullmatch(name)
        layer = first_layer + int(match[1]) if match else config.num_hidden_layers
        if match is None or layer >= config.num_hidden_layers:
            raise KeyError(name)
        kind, suffix = config.hybrid_layer_pattern[layer], match[2]
        prefix = f"backbone.layers.{layer}"
        if suffix in (_FUSED_NORM[kind], _UNFUSED_NORM[kind]):
            hf_names = (f"{prefix}.norm.weight",)
        elif suffix in _MIXERS[kind]:
            hf_names = tuple(f"{prefix}.mixer.{part}" for part in _MIXERS[kind][suffix])
        else:
            raise KeyError(name)
    return _source(config, hf_names)


def _source(config: ModelConfig, hf_names: tuple[str, ...]) -> Source:
    if ".mixer." not in hf_names[0] and not _is_vocabulary(hf_names[0]):  # the norms before the mixers and the last
        return Source(hf_names, None, ((),))
    dim = 1 if hf_names[0].endswith(_ROW_PARALLEL) else 0
    return Source(hf_names, dim, tuple(_blocks(config, hf_name, dim) for hf_name in hf_names))


def _blocks(config: ModelConfig, hf_name: str, dim: int) -> tuple[int, ...]:
    inner, state = config.mamba_inner_size, config.n_groups * config.ssm_state_size
    if hf_name.endswith("in_proj.weight"):
        return (inner, inner, state, state, config.mamba_num_heads)  # z, x, B, C, dt
    if ".conv1d." in hf_name:
        return (inner, state, state)  # x, B, C
    return (_shape(config, hf_name)[dim],)


def _shape(config: ModelConfig, hf_name: str) -> tuple[int, ...]:
    match = _HF_MIXER_NAME.fullmatch(hf_name)
    if match:
        return mixer_shapes(config, config.hybrid_layer_pattern[int(match[1])])[match[2]]
    return (config.vocab_size, config.hidden_size) if _is_vocabulary(hf_name) else (config.hidden_size,)


def shard_shape(config: ModelConfig, source: Source, tp_size: int) -> tuple[int, ...]:
    """Return the shape of one rank's part of a parameter."""
    shapes = [_shape(config, hf_name) for hf_name in source.hf_names]
    if source.dim is None:
        return shapes[0]
    size = sum(shape[source.dim] for shape in shapes)
    if _is_vocabulary(source.hf_names[0]):
        size = padded_vocab_size(size, tp_size)
    assert size % tp_size == 0, (source, tp_size)
    return (*shapes[0][: source.dim], size // tp_size, *shapes[0][source.dim + 1 :])


def _is_vocabulary(hf_name: str) -> bool:
    return hf_name in (_OUTSIDE_LAYERS[EMBEDDINGS], _OUTSIDE_LAYERS[HEAD])


def _rank_ranges(blocks: tuple[int, ...], tp_rank: int, tp_size: int) -> list[tuple[int, int]]:
    """Return this rank's [start, stop) of each block."""
    ranges, offset = [], 0
    for block in blocks:
        assert block % tp_size == 0, (blocks, tp_size)
        part = block // tp_size
        ranges.append((offset + tp_rank * part, offset + (tp_rank + 1) * part))
        offset += block
    return ranges


def to_megatron(config: ModelConfig, source: Source, read: ReadRanges, *, tp_rank: int, tp_size: int) -> Tensor:
    """Return one rank's part of a parameter, in the dtype on disk; padding rows of the vocabulary are zero.

    Args:
        config: the whole model.
        source: of `stage_sources` or `find_source`.
        read: gets parts of the tensors on disk; no more is read than this rank needs.
        tp_rank: tensor-parallel rank.
        tp_size: number of tensor-parallel ranks.
    """
    if source.dim is None:
        return read(source.hf_names[0], 0, [(0, _shape(config, source.hf_names[0])[0])])
    if _is_vocabulary(source.hf_names[0]):
        rows = padded_vocab_size(config.vocab_size, tp_size) // tp_size
        start, stop = (min(edge, config.vocab_size) for edge in (tp_rank * rows, (tp_rank + 1) * rows))
        held = read(source.hf_names[0], 0, [(start, stop)])
        return torch.cat([held, held.new_zeros(rows - len(held), held.shape[1])]) if len(held) < rows else held
    parts = [
        read(hf_name, source.dim, _rank_ranges(blocks, tp_rank, tp_size))
        for hf_name, blocks in zip(source.hf_names, source.blocks, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    groups = config.num_key_value_heads // tp_size
    woven = torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1)
    return woven.flatten(0, 1)


def to_hf(config: ModelConfig, source: Source, shards: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the whole tensors on disk of one parameter, in the dtype of the shards.

    Args:
        config: the whole model.
        source: of `stage_sources` or `find_source`.
        shards: of all tensor-parallel ranks, by rank.
    """
    if source.dim is None:
        return {source.hf_names[0]: shards[0]}
    if _is_vocabulary(source.hf_names[0]):
        return {source.hf_names[0]: torch.cat(list(shards))[: config.vocab_size]}
    if len(source.hf_names) == 1:
        return {source.hf_names[0]: _join(shards, source.blocks[0], source.dim)}
    sizes = [blocks[0] // config.num_key_value_heads for blocks in source.blocks]
    woven = torch.cat(list(shards)).unflatten(0, (config.num_key_value_heads, -1))
    parts = woven.split(sizes, dim=1)
    # cloned: with one group the three are views of one tensor, which safetensors does not write
    return {name: part.flatten(0, 1).clone() for name, part in zip(source.hf_names, parts, strict=True)}


def _join(shards: Sequence[Tensor], blocks: tuple[int, ...], dim: int) -> Tensor:
    """Join each block over the ranks, then the blocks."""
    split = [shard.split([block // len(shards) for block in blocks], dim=dim) for shard in shards]
    return torch.cat([part for block in zip(*split, strict=True) for part in block], dim=dim)


def in_file_order(sources: Mapping[str, Source], stored_names: Iterable[str]) -> list[tuple[str, Source]]:
    """Return the parameters sorted so that a checkpoint's files are read from front to back.

    Args:
        sources: of `stage_sources`.
        stored_names: HybridModel's names in the order of the files.
    """
    position = {name: index for index, name in enumerate(stored_names)}
    return sorted(sources.items(), key=lambda item: position[item[1].hf_names[0]])


def ranges_of(tensors: Mapping[str, Tensor]) -> ReadRanges:
    """Return a reader of tensors in memory."""

    def read(name: str, dim: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
        parts = [tensors[name].narrow(dim, start, stop - start) for start, stop in ranges]
        return torch.cat(parts, dim=dim)

    return read
