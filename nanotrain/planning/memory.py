"""Memory that a model needs to serve: weights, KV cache, and the constant-size Mamba states."""

from dataclasses import dataclass

from nanotrain.config.model import ModelConfig
from nanotrain.planning.parameters import count_parameters
from nanotrain.planning.patterns import count_layers


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes. Activations and the server's workspace are not counted; the published estimator's are unknown."""

    weights: int
    key_value_cache: int
    ssm_states: int
    convolution_states: int

    @property
    def total(self) -> int:
        return self.weights + self.key_value_cache + self.ssm_states + self.convolution_states


def inference_memory(
    config: ModelConfig,
    context_length: int,
    batch_size: int,
    bytes_per_weight: int = 2,
    bytes_per_ssm_value: int = 2,
) -> InferenceMemory:
    """Estimate the bytes that `batch_size` sequences of `context_length` tokens need.

    Args:
        bytes_per_weight: of weights, KV cache and convolution states; 2 = bf16.
        bytes_per_ssm_value: of SSM states; 2 reproduces the published budget's arithmetic, servers keep 4 (fp32).
    """
    layers = count_layers(config.hybrid_layer_pattern)
    key_value = 2 * config.num_key_value_heads * config.head_dim
    ssm_values = layers.mamba * config.mamba_inner_size * config.ssm_state_size
    convolution_values = layers.mamba * config.conv_channels * (config.conv_kernel - 1)
    return InferenceMemory(
        weights=count_parameters(config) * bytes_per_weight,
        key_value_cache=batch_size * context_length * layers.attention * key_value * bytes_per_weight,
        ssm_states=batch_size * ssm_values * bytes_per_ssm_value,
        convolution_states=batch_size * convolution_values * bytes_per_weight,
    )


def inference_memory_bytes(
    config: ModelConfig,
    context_length: int,
    batch_size: int,
    bytes_per_weight: int = 2,
    bytes_per_ssm_value: int = 2,
) -> int:
    """Return the total of `inference_memory`."""
    return inference_memory(config, context_length, batch_size, bytes_per_weight, bytes_per_ssm_value).total
