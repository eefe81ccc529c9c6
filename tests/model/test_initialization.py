"""Distributions of spec 1.6 (Megatron-LM's), each tensor judged by its own statistics."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanotrain.config.model import ModelConfig
from nanotrain.model.hybrid import HybridModel
from nanotrain.model.initialization import initial_value


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig(
        hybrid_layer_pattern="M-M*-M",
        vocab_size=300,
        hidden_size=96,
        intermediate_size=200,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        mamba_num_heads=400,
        mamba_head_dim=1,
        ssm_state_size=8,
        n_groups=2,
        initializer_range=0.0125,
    )


@pytest.fixture(scope="module")
def weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    model = HybridModel(config)
    model.init_weights(1)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_linear_weights_and_embeddings(config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
    plain, output_side = ("in_proj", "q_proj", "k_proj", "v_proj", "up_proj"), ("out_proj", "o_proj", "down_proj")
    checked = 0
    for name, weight in weights.items():
        parts = name.split(".")
        std = None
        if name in ("lm_head.weight", "backbone.embeddings.weight") or parts[-2] in plain:
            std = 0.0125
        elif parts[-2] in output_side:
            std = 0.0125 / math.sqrt(6)
        if std is not None:
            assert abs(float(weight.std()) / std - 1) < 0.05, name
            assert abs(float(weight.mean())) < 0.05 * std, name
            checked += 1
    assert checked == 2 + 3 * 2 + 4 + 2 * 2


def test_mamba_parameters(config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
    A = weights["backbone.layers.0.mixer.A_log"].exp()
    assert 1 <= float(A.min()) < 1.3 and 15.7 < float(A.max()) <= 16.001
    assert abs(float(A.mean()) - 8.5) < 0.8
    assert torch.equal(weights["backbone.layers.0.mixer.D"], torch.ones(400))
    dt = F.softplus(weights["backbone.layers.0.mixer.dt_bias"])
    assert 0.00099 < float(dt.min()) < 0.0012 and 0.09 < float(dt.max()) < 0.1001
    assert abs(float(dt.log().mean()) - math.log(0.01)) < 0.25  # log-uniform
    conv, bias = weights["backbone.layers.0.mixer.conv1d.weight"], weights["backbone.layers.0.mixer.conv1d.bias"]
    for tensor in (conv, bias):
        assert float(tensor.abs().max()) <= 0.5
        assert abs(float(tensor.std()) - 1 / math.sqrt(12)) < 0.03
    for name, weight in weights.items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name


def test_dt_floor(config: ModelConfig) -> None:
    narrow = ModelConfig(**{**config.__dict__, "dt_init_floor": 0.001, "dt_init_min": 0.001, "dt_init_max": 0.001})
    dt = F.softplus(initial_value("backbone.layers.0.mixer.dt_bias", (50,), narrow, 0))
    torch.testing.assert_close(dt, torch.full((50,), 0.001), rtol=1e-4, atol=0)


def test_seed_and_name_decide_and_nothing_else(config: ModelConfig) -> None:
    torch.manual_seed(0)
    first = initial_value("backbone.layers.0.mixer.in_proj.weight", (5, 7), config, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = initial_value("backbone.layers.0.mixer.in_proj.weight", (5, 7), config, 3)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, initial_value("backbone.layers.0.mixer.in_proj.weight", (5, 7), config, 4))
    assert not torch.equal(first, initial_value("backbone.layers.2.mixer.in_proj.weight", (5, 7), config, 3))
