"""Floating-point operations per token, counted exactly for hybrids; a multiply-add is two.

The width of a Mamba-2 layer is heads x head_dim. Counters that take 2 x hidden_size instead are off by 5-9% for
pruned models, whose inner width is no multiple of their hidden size.
"""

from dataclasses import dataclass

from nanotrain.config.model import ModelConfig
from nanotrain.planning.patterns import count_layers

TRAINING_OVER_FORWARD = 3
"""Forward plus a backward of twice its operations: the customary model FLOPs, without any recomputation."""


@dataclass(frozen=True)
class ForwardFlops:
    """Forward operations per token, summed over the layers. Norms, gates and activations are not counted."""

    mamba_projections: int
    attention_projections: int
    mlp: int
    output_head: int
    attention_core: float
    """Scores and weighted values, averaged over the causal positions of a sequence."""
    state_space_scan: float
    """Chunked SSD scan: C.B products and their use within chunks (full squares), chunk states, their passing."""
    convolution: int

    @property
    def matrix_products(self) -> int:
        return self.mamba_projections + self.attention_projections + self.mlp + self.output_head

    @property
    def total(self) -> float:
        return self.matrix_products + self.attention_core + self.state_space_scan + self.convolution


def forward_flops(config: ModelConfig, sequence_length: int) -> ForwardFlops:
    """Count the operations of one token's forward pass in sequences of `sequence_length` tokens."""
    assert sequence_length >= 1, sequence_length
    layers = count_layers(config.hybrid_layer_pattern)
    hidden, inner = config.hidden_size, config.mamba_inner_size
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    return ForwardFlops(
        mamba_projections=2 * layers.mamba * hidden * (config.in_proj_size + inner),
        attention_projections=2 * layers.attention * hidden * (2 * query + 2 * key_value),
        mlp=4 * layers.mlp * hidden * config.intermediate_size,
        output_head=2 * config.vocab_size * hidden,
        attention_core=layers.attention * 4 * query * (sequence_length + 1) / 2,
        state_space_scan=layers.mamba * _scan_flops(config, sequence_length),
        convolution=2 * layers.mamba * config.conv_channels * config.conv_kernel,
    )


def _scan_flops(config: ModelConfig, sequence_length: int) -> float:
    """Return one layer's scan operations per token; a sequence shorter than a chunk is one short chunk."""
    chunk = min(config.chunk_size, sequence_length)
    scores = 2 * chunk * config.n_groups * config.ssm_state_size
    within_chunk = 2 * chunk * config.mamba_inner_size
    state_values = config.mamba_inner_size * config.ssm_state_size
    return scores + within_chunk + 2 * state_values + 2 * state_values + 2 * state_values / chunk


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Return the forward operations per token."""
    return forward_flops(config, sequence_length).total


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Return the operations per token of forward and backward: what model FLOPs utilisation divides by."""
    return TRAINING_OVER_FORWARD * forward_flops_per_token(config, sequence_length)
