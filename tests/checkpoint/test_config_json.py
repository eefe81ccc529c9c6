"""config.json, ours and published ones, good and bad."""

import json
import math
from pathlib import Path

import pytest
from transformers import NemotronHConfig

from nanotrain.checkpoint.config_json import (
    EXPORTED_TIME_STEP_MIN,
    config_changes,
    from_json,
    generation_json,
    read_config_json,
    to_json,
)
from nanotrain.config.errors import MissingInputError, UserError
from tests.checkpoint.conftest import small_config

FILE = Path("folder/config.json")

PUBLISHED_9B = {
    "architectures": ["NemotronHForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 56,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "hidden_size": 4480,
    "intermediate_size": 15680,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "num_query_groups": 8,
    "head_dim": 128,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "mamba_num_heads": 128,
    "mamba_head_dim": 80,
    "n_groups": 8,
    "mamba_num_groups": 8,
    "ssm_state_size": 128,
    "mamba_state_dim": 128,
    "conv_kernel": 4,
    "chunk_size": 128,
    "use_conv_bias": True,
    "use_bias": False,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "use_mamba_kernels": True,
    "time_step_rank": 256,
    "time_step_limit": [0.0, math.inf],
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 0.0001,
    "layer_norm_epsilon": 1e-5,
    "rms_norm_eps": 1e-5,
    "residual_in_fp32": False,
    "rescale_prenorm_residual": True,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
    "max_position_embeddings": 131072,
    "sliding_window": None,
    "num_logits_to_keep": 1,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 12,
    "pad_token_id": 0,
    "transformers_version": "4.53.2",
}
"""The keys of a published config.json, as the hub has them."""


def test_published_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_9B))  # writes Infinity, as the hub's files do
    assert "Infinity" in (tmp_path / "config.json").read_text()
    content = read_config_json(tmp_path)
    config = from_json(content, tmp_path / "config.json")
    assert (config.hidden_size, config.mamba_inner_size, config.in_proj_size) == (4480, 10240, 22656)
    assert (config.dt_init_min, config.dt_init_max, config.dt_init_floor) == (0.001, 0.1, 0.0001)
    changes = config_changes(content)
    assert changes["time_step_min"]["from"] == 0.001 and changes["time_step_min"]["to"] == EXPORTED_TIME_STEP_MIN
    assert config_changes(to_json(config, "bfloat16")) == {}


def test_our_config_is_strict_json_and_comes_back_and_means_the_same_to_transformers() -> None:
    config = small_config(dt_init_min=0.002, dt_init_max=0.3, dt_init_floor=0.001, tie_word_embeddings=True)
    content = to_json(config, "float32")
    text = json.dumps(content, allow_nan=False)
    assert from_json(json.loads(text), FILE) == config
    theirs = NemotronHConfig(**json.loads(text))
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "head_dim",
        "n_groups",
        "ssm_state_size",
        "chunk_size",
    ):
        assert getattr(theirs, name) == getattr(config, name)
    assert theirs.hybrid_override_pattern == config.hybrid_layer_pattern
    assert theirs.time_step_min == EXPORTED_TIME_STEP_MIN
    assert from_json(theirs.to_dict(), FILE) == config


@pytest.mark.parametrize("given", ["hybrid_override_pattern", "layers_block_type"])
@pytest.mark.parametrize("old_names", [False, True])
def test_one_spelling_of_the_layers_is_enough(given: str, old_names: bool) -> None:
    config = small_config()
    content = to_json(config, "float32")
    other = {"hybrid_override_pattern": "layers_block_type"}.get(given, "hybrid_override_pattern")
    del content[other]
    if given == "layers_block_type" and old_names:
        content[given] = ["mamba", "mlp", "attention", "mamba"]
    assert from_json(content, FILE).hybrid_layer_pattern == "M-*M"


def test_defaults_of_keys_that_may_be_absent() -> None:
    content = to_json(small_config(), "float32")
    for key in ("conv_kernel", "tie_word_embeddings", "layer_norm_epsilon", "num_hidden_layers", "dt_init_min"):
        del content[key]
    config = from_json(content, FILE)
    assert (config.conv_kernel, config.tie_word_embeddings, config.layer_norm_epsilon) == (4, False, 1e-5)
    assert config.dt_init_min == 0.001


def test_attention_head_dim_is_another_name_of_head_dim() -> None:
    content = to_json(small_config(), "float32")
    content["attention_head_dim"] = content.pop("head_dim")
    assert from_json(content, FILE) == small_config()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mlp_bias": True}, "`mlp_bias`"),
        ({"attention_bias": True}, "`attention_bias`"),
        ({"use_bias": True}, "`use_bias`"),
        ({"mamba_proj_bias": True}, "`mamba_proj_bias`"),
        ({"use_conv_bias": False}, "`use_conv_bias`"),
        ({"mamba_hidden_act": "gelu"}, "'gelu'"),
        ({"mlp_hidden_act": "silu"}, "'silu'"),
        ({"sliding_window": 4096}, "`sliding_window` is 4096"),
        ({"attention_dropout": 0.1}, "`attention_dropout`"),
        ({"residual_in_fp32": True}, "`residual_in_fp32`"),
        ({"num_nextn_predict_layers": 1}, "`num_nextn_predict_layers`"),
        ({"quantization_config": {"quant_method": "fp8"}}, "`quantization_config`"),
        ({"time_step_limit": [0.001, 0.1]}, "`time_step_limit`"),
        ({"time_step_limit": "none"}, "`time_step_limit`"),
        ({"hybrid_override_pattern": "M-*E", "layers_block_type": None}, "mixture-of-experts"),
        ({"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"]}, "mixture-of-experts"),
        ({"hybrid_override_pattern": "M-*X"}, "'X'"),
        ({"hybrid_override_pattern": "M-**"}, "must agree"),
        ({"hybrid_override_pattern": ""}, "`hybrid_override_pattern` is empty"),
        ({"hybrid_override_pattern": None, "layers_block_type": None}, "both missing"),
        ({"num_hidden_layers": 5}, "`num_hidden_layers` (5)"),
        ({"hidden_size": None}, "`hidden_size` is missing"),
        ({"hidden_size": "16"}, "`hidden_size` ('16')"),
        ({"hidden_size": True}, "`hidden_size` (True)"),
        ({"hidden_size": 0}, "hidden_size` (0)"),
        ({"num_query_groups": 4}, "`num_query_groups` (4)"),
        ({"tie_word_embeddings": "no"}, "`tie_word_embeddings`"),
        ({"layer_norm_epsilon": "small"}, "`layer_norm_epsilon`"),
        ({"n_groups": 4}, "divisible"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(change: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        from_json(to_json(small_config(), "float32") | change, FILE)
    assert said in str(error.value)
    assert "config.json" in str(error.value)


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="not a folder"):
        read_config_json(tmp_path / "absent")
    with pytest.raises(MissingInputError, match=r"config\.json is missing"):
        read_config_json(tmp_path)
    for content, said in [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "no `model_type`"),
        (b"{}", "no `model_type`"),
        (b'{"model_type": "llama"}', "'llama'"),
    ]:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_config_json(tmp_path)


def test_stop_ids_outside_of_a_small_vocabulary_are_left_out() -> None:
    assert generation_json(small_config(vocab_size=12))["eos_token_id"] == [2, 11]
    assert generation_json(small_config(vocab_size=40))["eos_token_id"] == [2, 11, 12]
