"""Exact parameter counts and tensor shapes from the configuration alone.

`tensor_shapes` is the table of NemotronH's tensors on disk; every count is a sum over it or its closed form.
"""

from collections.abc import Iterator

from nanotrain.config.model import ATTENTION, MAMBA, MLP, ModelConfig
from nanotrain.planning.patterns import count_layers

FP32_TENSORS = ("A_log", "D", "dt_bias")
"""Last part of the names of tensors that a checkpoint keeps in fp32 whatever its dtype."""


def mixer_parameters(config: ModelConfig) -> dict[str, int]:
    """Return the parameters of one mixer of each kind (without the norm before it), by letter."""
    hidden, inner = config.hidden_size, config.mamba_inner_size
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    projections = config.in_proj_size * hidden + hidden * inner
    convolution = config.conv_channels * (config.conv_kernel + 1)
    per_head = 3 * config.mamba_num_heads  # A_log, D, dt_bias
    return {
        MAMBA: projections + convolution + per_head + inner,
        ATTENTION: 2 * hidden * query + 2 * hidden * key_value,
        MLP: 2 * hidden * config.intermediate_size,
    }


def embedding_parameters(config: ModelConfig) -> int:
    """Return the parameters of the input and output embeddings together (once when they are tied)."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def count_parameters(config: ModelConfig) -> int:
    """Return the exact number of parameters."""
    mixers = mixer_parameters(config)
    layers = sum(mixers[letter] + config.hidden_size for letter in config.hybrid_layer_pattern)
    return layers + embedding_parameters(config) + config.hidden_size


def count_non_embedding_parameters(config: ModelConfig) -> int:
    """Return the number of parameters outside the two embeddings."""
    return count_parameters(config) - embedding_parameters(config)


def checkpoint_bytes(config: ModelConfig, bytes_per_weight: int = 2) -> int:
    """Return the bytes of the tensors of a saved checkpoint; A_log, D and dt_bias are always 4 bytes a value."""
    fp32_values = len(FP32_TENSORS) * config.mamba_num_heads * count_layers(config.hybrid_layer_pattern).mamba
    return (count_parameters(config) - fp32_values) * bytes_per_weight + fp32_values * 4


def mixer_shapes(config: ModelConfig, kind: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors of one mixer; linear weights are [outputs, inputs]."""
    hidden, heads, inner = config.hidden_size, config.mamba_num_heads, config.mamba_inner_size
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    if kind == MAMBA:
        return {
            "in_proj.weight": (config.in_proj_size, hidden),
            "conv1d.weight": (config.conv_channels, 1, config.conv_kernel),
            "conv1d.bias": (config.conv_channels,),
            "A_log": (heads,),
            "D": (heads,),
            "dt_bias": (heads,),
            "norm.weight": (inner,),
            "out_proj.weight": (hidden, inner),
        }
    if kind == ATTENTION:
        return {
            "q_proj.weight": (query, hidden),
            "k_proj.weight": (key_value, hidden),
            "v_proj.weight": (key_value, hidden),
            "o_proj.weight": (hidden, query),
        }
    assert kind == MLP, kind
    return {
        "up_proj.weight": (config.intermediate_size, hidden),
        "down_proj.weight": (hidden, config.intermediate_size),
    }


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor, in NemotronH's names; without lm_head when embeddings are tied."""
    return dict(_named_shapes(config))


def _named_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "backbone.embeddings.weight", (config.vocab_size, config.hidden_size)
    for index, kind in enumerate(config.hybrid_layer_pattern):
        yield f"backbone.layers.{index}.norm.weight", (config.hidden_size,)
        for name, shape in mixer_shapes(config, kind).items():
            yield f"backbone.layers.{index}.mixer.{name}", shape
    yield "backbone.norm_f.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)
