"""Published values of Nemotron Nano 2 with their sources, as data: for recipes, docs and the report's comparison.

A value that is not published is not here, except where `status` says what it is instead.
"""

from dataclasses import dataclass
from enum import Enum

SOURCES = {
    "paper": "NVIDIA Nemotron Nano 2, arXiv 2508.14444v4",
    "config": "config.json of NVIDIA-Nemotron-Nano-12B-v2-Base",
    "card": "model card of NVIDIA-Nemotron-Nano-12B-v2-Base",
    "bridge": "NVIDIA-NeMo/Megatron-Bridge, recipes/nemotronh/h100/nemotron_nano_v2.py",
    "megatron": "NVIDIA/Megatron-LM, launch script of the 12B (nemotron5p5_12b_H) and mamba_mixer.py",
    "super": "NVIDIA-NeMo/Nemotron, Nemotron 3 Super recipe",
    "arithmetic": "computed from published values",
}


class Status(str, Enum):
    published = "published"
    derived = "derived"
    """Follows from published values by arithmetic."""
    proxy = "proxy"
    """Not published for this model; a sibling's published value."""


@dataclass(frozen=True)
class PublishedValue:
    """One value, where it stands, and what to know about it."""

    value: int | float | str | bool | tuple[int, ...]
    sources: tuple[str, ...]
    """Keys of SOURCES."""
    status: Status = Status.published
    note: str = ""


_CONFIG_AND_CODE = ("config", "bridge", "megatron")


def _architecture(pattern: PublishedValue, hidden_size: int, intermediate_size: int) -> dict[str, PublishedValue]:
    return {
        "hybrid_layer_pattern": pattern,
        "vocab_size": PublishedValue(131072, _CONFIG_AND_CODE),
        "hidden_size": PublishedValue(hidden_size, ("paper", "bridge")),
        "intermediate_size": PublishedValue(intermediate_size, ("paper", "bridge")),
        "num_attention_heads": PublishedValue(40, ("paper", "config", "bridge")),
        "num_key_value_heads": PublishedValue(8, ("paper", "config", "bridge")),
        "head_dim": PublishedValue(128, ("paper", "config", "bridge")),
        "mamba_num_heads": PublishedValue(128, _CONFIG_AND_CODE),
        "mamba_head_dim": PublishedValue(80, _CONFIG_AND_CODE, note="the paper says 64; config and code say 80"),
        "ssm_state_size": PublishedValue(128, ("paper", "config")),
        "n_groups": PublishedValue(8, ("paper", "config")),
        "conv_kernel": PublishedValue(4, ("paper", "config")),
        "chunk_size": PublishedValue(128, ("config", "megatron")),
        "tie_word_embeddings": PublishedValue(False, ("paper", "config")),
        "layer_norm_epsilon": PublishedValue(1e-5, ("paper", "config", "megatron")),
        "max_position_embeddings": PublishedValue(131072, ("config",)),
        "initializer_range": PublishedValue(0.0125, ("megatron",), note="config.json's 0.02 was not used"),
        "dt_init_min": PublishedValue(0.001, ("config", "megatron")),
        "dt_init_max": PublishedValue(0.1, ("config", "megatron")),
        "dt_init_floor": PublishedValue(1e-4, ("config", "megatron")),
    }


ARCHITECTURE_12B = _architecture(
    PublishedValue("M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", _CONFIG_AND_CODE), 5120, 20480
)
"""ModelConfig key -> value of the 12B (configs/model/nemotron_nano_12b_v2.yaml)."""
ARCHITECTURE_9B = _architecture(
    PublishedValue("M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", ("bridge",)), 4480, 15680
)
"""ModelConfig key -> value of the 9B (configs/model/nemotron_nano_9b_v2.yaml); `config` is the 12B's, whose other
values the 9B shares."""

PARAMETERS = {
    "12b": PublishedValue(12_310_001_152, ("arithmetic",), Status.derived, "published as 12.31B"),
    "9b": PublishedValue(8_888_227_328, ("arithmetic",), Status.derived, "published as 8.89B"),
    "candidate_1": PublishedValue(8_923_356_912, ("arithmetic",), Status.derived, "published as 8.92B"),
    "candidate_3": PublishedValue(8_965_788_600, ("arithmetic",), Status.derived, "published as 8.97B"),
}

PRETRAINING = {
    "tokens": PublishedValue(20_000_000_000_000, ("paper",)),
    "sequence_length": PublishedValue(8192, ("paper",)),
    "tokens_per_step": PublishedValue(6_029_312, ("paper",)),
    "global_batch_size": PublishedValue(736, ("card",), note="the paper prints 768, not tokens_per_step / 8192"),
    "learning_rate": PublishedValue(4.5e-4, ("paper",)),
    "min_learning_rate": PublishedValue(4.5e-6, ("paper",)),
    "schedule": PublishedValue("wsd", ("paper",)),
    "decay_shape": PublishedValue("minus_sqrt", ("super",), Status.proxy),
    "warmup_tokens": PublishedValue(8_000_000_000, ("card",)),
    "decay_tokens": PublishedValue(3_600_000_000_000, ("paper",)),
    "beta1": PublishedValue(0.9, ("paper",)),
    "beta2": PublishedValue(0.95, ("paper",)),
    "weight_decay": PublishedValue(0.1, ("paper",)),
    "gradient_clip": PublishedValue(1.0, ("megatron",), Status.proxy, "from the script of the aligned model's run"),
    "phase_2_from": PublishedValue(0.6, ("paper",), note="share of the tokens"),
    "phase_3_from": PublishedValue(0.9, ("paper",), note="share of the tokens"),
}

PRUNING = {
    "calibration_samples": PublishedValue(1024, ("paper",)),
    "num_layers": PublishedValue(56, ("paper",)),
    "num_attention_layers": PublishedValue(4, ("paper",)),
    "hidden_size_range": PublishedValue((4480, 5120), ("paper",)),
    "intermediate_size_range": PublishedValue((13440, 20480), ("paper",)),
    "mamba_num_heads_range": PublishedValue((112, 128), ("paper",)),
    "context_length": PublishedValue(131072, ("paper",), note="batch 1, bf16"),
    "memory_budget_gib": PublishedValue(
        19.66, ("paper",), note="22.06 GiB of an A10G x 0.95, less 1.3 GiB for a vision encoder"
    ),
    "top_candidates": PublishedValue(3, ("paper",)),
    "removed_layers": PublishedValue(
        (7, 8, 17, 18, 48, 52),
        ("arithmetic",),
        Status.derived,
        "the simplest of seven deletions that turn the 12B's layer string into the 9B's; the one used is unknown",
    ),
}

CANDIDATES = {
    "candidate_1": {"num_layers": 56, "hidden_size": 4480, "intermediate_size": 17920, "mamba_num_heads": 112},
    "candidate_2": {"num_layers": 56, "hidden_size": 4480, "intermediate_size": 15680, "mamba_num_heads": 128},
    "candidate_3": {"num_layers": 56, "hidden_size": 4800, "intermediate_size": 14400, "mamba_num_heads": 120},
}
"""The three width candidates of the paper's Table 10; the second became the 9B."""

DISTILLATION_TOKENS = {
    "depth_8k": PublishedValue(60_000_000_000, ("paper",)),
    "width_8k": PublishedValue(50_000_000_000, ("paper",)),
    "width_49k": PublishedValue(25_000_000_000, ("paper",)),
    "width_262k": PublishedValue(1_000_000_000, ("paper",)),
    "after_rl_262k": PublishedValue(400_000_000, ("paper",)),
}
"""Approximate tokens of each distillation of the reasoning 9B; the key's end is the sequence length."""

REASONING = {
    "truncated_fraction": PublishedValue(0.05, ("paper",), note="share of the data; of what exactly is not stated"),
    "truncated_min_tokens": PublishedValue(1000, ("paper",)),
    "truncated_max_tokens": PublishedValue(2000, ("paper",)),
    "empty_trace_fraction": PublishedValue(0.10, ("paper",)),
    "budget_grace_tokens": PublishedValue(500, ("paper",)),
}
