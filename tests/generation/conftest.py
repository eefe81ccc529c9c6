"""A tiny hybrid model with trained-looking weights."""

import pytest
import torch

from nanotrain.config.model import ModelConfig
from nanotrain.model.hybrid import HybridModel


@pytest.fixture(scope="session")
def tiny_model() -> HybridModel:
    config = ModelConfig(
        hybrid_layer_pattern="M-*M-",
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=8,
        initializer_range=0.3,
    )
    model = HybridModel(config)
    model.init_weights(3)
    return model.eval()


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 50, (length,), generator=generator).tolist() for length in (1, 7, 3, 12, 2)]
