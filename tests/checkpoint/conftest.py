"""A small model in a folder, and a tokenizer folder made on the spot."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanotrain.checkpoint.hf_folder import save_model
from nanotrain.config.model import ModelConfig
from nanotrain.model.hybrid import HybridModel


def small_config(**changes: object) -> ModelConfig:
    sizes = {
        "hybrid_layer_pattern": "M-*M",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_num_heads": 6,
        "mamba_head_dim": 4,
        "ssm_state_size": 5,
        "n_groups": 2,
        "chunk_size": 8,
        "initializer_range": 0.2,
    }
    return ModelConfig(**{**sizes, **changes})


@pytest.fixture
def config() -> ModelConfig:
    return small_config()


@pytest.fixture
def model(config: ModelConfig) -> HybridModel:
    model = HybridModel(config)
    model.init_weights(1)
    return model.eval()


@pytest.fixture
def folder(model: HybridModel, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "hf")
    return tmp_path / "hf"


def write_tokenizer(folder: Path, num_tokens: int) -> Path:
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, num_tokens)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder
