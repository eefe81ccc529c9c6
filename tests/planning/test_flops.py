"""Against the published figures (GFLOP per token) and against torch's own counter on the parts that it can see."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanotrain.config.model import ModelConfig
from nanotrain.model.hybrid import HybridModel
from nanotrain.planning.flops import forward_flops, forward_flops_per_token, training_flops_per_token

GIGA = 1e9


@pytest.mark.parametrize(
    "size, gigaflops",
    [("12b", (6.496 + 2.936, 0.755, 11.744, 1.342, 23.27)), ("9b", (5.481 + 2.477, 0.440, 7.025, 1.174, 16.60))],
)
def test_matrix_products(published, size, gigaflops):
    flops = forward_flops(published(size), 8192)
    parts = (flops.mamba_projections, flops.attention_projections, flops.mlp, flops.output_head, flops.matrix_products)
    assert [part / GIGA for part in parts] == pytest.approx(gigaflops, abs=5e-3)


@pytest.mark.parametrize("length, attention_core, forward", [
    (8192, 0.503, 24.01), (49152, 3.020, 26.52), (131072, 8.053, 31.56), (524288, 32.21, 55.72),
])  # fmt: skip
def test_forward_of_the_12b(published, length, attention_core, forward):
    flops = forward_flops(published("12b"), length)
    assert flops.attention_core / GIGA == pytest.approx(attention_core, abs=3e-3)
    assert flops.state_space_scan / GIGA == pytest.approx(0.228, abs=5e-4)
    assert flops.convolution / GIGA == pytest.approx(0.003, abs=5e-4)
    assert flops.total / GIGA == pytest.approx(forward, abs=6e-3)
    assert forward_flops_per_token(published("12b"), length) == flops.total


def test_training_counts_three_forwards(published):
    assert training_flops_per_token(published("12b"), 8192) / GIGA == pytest.approx(72.01, abs=2e-2)
    assert training_flops_per_token(published("9b"), 8192) / GIGA == pytest.approx(51.46, abs=2e-2)


def test_width_of_a_pruned_model_is_heads_times_head_dim(published):
    nine = published("9b")
    wrong = dataclasses.replace(nine, mamba_num_heads=2 * nine.hidden_size // nine.mamba_head_dim)
    ratio = training_flops_per_token(wrong, 8192) / training_flops_per_token(nine, 8192)
    assert ratio == pytest.approx(48.66 / 51.46, abs=3e-3)


def test_matrix_products_against_torchs_counter():
    config = ModelConfig(
        hybrid_layer_pattern="--", vocab_size=64, hidden_size=16, intermediate_size=24, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2,
    )  # fmt: skip
    model = HybridModel(config)
    model.init_weights(0)
    tokens = torch.randint(0, 64, (2, 10))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    assert counter.get_total_flops() == forward_flops(config, 10).total * 20


def test_a_short_sequence_is_one_short_chunk(published):
    config = published("9b")
    assert forward_flops(config, 64).state_space_scan == pytest.approx(
        forward_flops(dataclasses.replace(config, chunk_size=64), 64).state_space_scan
    )
    assert forward_flops(config, 1).attention_core == 4 * 4 * 40 * 128
