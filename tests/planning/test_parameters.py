import dataclasses
from math import prod

import pytest
import torch

from nanotrain.config.model import ModelConfig
from nanotrain.model.hybrid import HybridModel
from nanotrain.planning import parameters
from nanotrain.planning.paper import CANDIDATES, PARAMETERS


def tiny(**changes) -> ModelConfig:
    sizes = {
        "hybrid_layer_pattern": "M-*M",
        "vocab_size": 50,
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
    }
    return ModelConfig(**(sizes | changes))


def meta_model(config: ModelConfig) -> HybridModel:
    with torch.device("meta"):
        return HybridModel(config)


@pytest.mark.parametrize("size, total, without_embeddings", [
    ("12b", 12_310_001_152, 10_967_823_872),
    ("9b", 8_888_227_328, 7_713_822_208),
])  # fmt: skip
def test_published_models(published, size, total, without_embeddings):
    config = published(size)
    assert parameters.count_parameters(config) == total == PARAMETERS[size].value
    assert parameters.count_non_embedding_parameters(config) == without_embeddings
    model = meta_model(config)
    assert sum(p.numel() for p in model.parameters()) == total
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == parameters.tensor_shapes(config)


@pytest.mark.parametrize("name, total", [("candidate_1", 8_923_356_912), ("candidate_3", 8_965_788_600)])
def test_published_candidates(published, name, total):
    sizes = {key: value for key, value in CANDIDATES[name].items() if key != "num_layers"}
    config = dataclasses.replace(published("9b"), **sizes)
    assert parameters.count_parameters(config) == total == PARAMETERS[name].value


def test_published_mixers(published):
    mamba, attention, mlp = (parameters.mixer_parameters(published("12b"))[kind] for kind in "M*-")
    assert (mamba, attention, mlp) == (168_499_584, 62_914_560, 209_715_200)
    mamba, attention, mlp = (parameters.mixer_parameters(published("9b"))[kind] for kind in "M*-")
    assert (mamba, attention, mlp) == (147_446_144, 55_050_240, 140_492_800)


def test_full_width_at_56_layers(published):
    config = dataclasses.replace(published("12b"), hybrid_layer_pattern=published("9b").hybrid_layer_pattern)
    assert parameters.count_parameters(config) == 11_386_496_128


@pytest.mark.parametrize("pattern", ["M", "-", "*", "M-*M", "--**MM"])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_a_real_model(pattern, tied):
    config = tiny(hybrid_layer_pattern=pattern, tie_word_embeddings=tied)
    model = meta_model(config)
    assert parameters.count_parameters(config) == sum(p.numel() for p in model.parameters())
    assert parameters.count_parameters(config) == sum(map(prod, parameters.tensor_shapes(config).values()))
    embeddings = 50 * 12 * (1 if tied else 2)
    assert parameters.embedding_parameters(config) == embeddings
    assert parameters.count_non_embedding_parameters(config) == parameters.count_parameters(config) - embeddings


def test_checkpoint_bytes_keep_what_the_model_keeps_in_fp32():
    config = tiny()
    expected = sum(
        prod(shape) * (4 if name.endswith(parameters.FP32_TENSORS) else 2)
        for name, shape in parameters.tensor_shapes(config).items()
    )
    assert parameters.checkpoint_bytes(config) == expected
    assert parameters.checkpoint_bytes(config, 4) == 4 * parameters.count_parameters(config)
