from collections.abc import Callable

import pytest
import torch

from nanotrain.config.model import ModelConfig
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import HybridModel


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """Six heads of width 5 in three groups: the inner width (30) is not 2 x hidden (24), and nothing is a power of 2."""

    def build(**changes) -> ModelConfig:
        sizes = {
            "hybrid_layer_pattern": "M-*M-M",
            "vocab_size": 40,
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "mamba_num_heads": 6,
            "mamba_head_dim": 5,
            "ssm_state_size": 7,
            "n_groups": 3,
            "conv_kernel": 3,
            "chunk_size": 4,
            "layer_norm_epsilon": 1e-30,
        }
        return ModelConfig(**(sizes | changes))

    return build


@pytest.fixture(scope="session")
def random_model() -> Callable[..., HybridModel]:
    """A model in evaluation mode whose every tensor is random and far from its neutral value, fp64 by default."""

    def build(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> HybridModel:
        model = HybridModel(config)
        model.init_weights(seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def batches() -> Callable[..., list[MicroBatch]]:
    """Random tokens, two documents a row."""

    def build(config: ModelConfig, sizes: tuple[int, ...] = (3, 2), length: int = 9, seed: int = 0) -> list[MicroBatch]:
        generator = torch.Generator().manual_seed(seed)
        result = []
        for rows in sizes:
            tokens = torch.randint(0, config.vocab_size, (rows, length + 1), generator=generator)
            border = torch.randint(1, length, (rows, 1), generator=generator)
            segments = (torch.arange(length) >= border).int()
            result.append(MicroBatch(tokens[:, :-1], tokens[:, 1:], segments))
        return result

    return build
