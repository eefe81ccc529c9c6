"""Small random architectures, and models of them whose every parameter matters."""

import random

import torch

from nanotrain.config.model import ModelConfig
from nanotrain.model.hybrid import HybridModel

FIXED_PATTERNS = ("M", "*", "-", "MM", "M-", "*-", "M*", "M-M*-M-")


def random_config(seed: int) -> ModelConfig:
    """Return an architecture; the first seeds cover the patterns without attention, without Mamba, without both."""
    rng = random.Random(seed)
    groups, kv_heads = rng.choice([1, 2, 3]), rng.choice([1, 2])
    pattern = FIXED_PATTERNS[seed] if seed < len(FIXED_PATTERNS) else "".join(rng.choices("MM*-", k=rng.randint(3, 6)))
    config = ModelConfig(
        hybrid_layer_pattern=pattern,
        vocab_size=rng.randint(20, 60),
        hidden_size=rng.choice([8, 12, 20, 24]),
        intermediate_size=rng.choice([7, 16, 30]),
        num_attention_heads=kv_heads * rng.choice([1, 2, 3]),
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([4, 5, 8]),
        mamba_num_heads=groups * rng.choice([1, 2, 3]),
        mamba_head_dim=rng.choice([2, 3, 4, 8]),
        ssm_state_size=rng.choice([1, 3, 4, 8]),
        n_groups=groups,
        conv_kernel=rng.choice([2, 3, 4]),
        chunk_size=rng.choice([4, 5, 8, 16]),
        tie_word_embeddings=rng.random() < 0.4,
        layer_norm_epsilon=rng.choice([1e-5, 1e-3]),
        initializer_range=0.25,
    )
    config.validate("test")
    return config


def random_model(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> HybridModel:
    """Return a model in eval mode; norms, D, biases and dt_bias are random too, so that none of them hides."""
    model = HybridModel(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D", "conv1d.bias", ".dt_bias")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype).eval()


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, length), generator=generator)
