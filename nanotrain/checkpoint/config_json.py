"""NemotronH's config.json <-> ModelConfig.

Both spellings of the layer pattern are written, so that transformers' own class and the published remote code read the
folder alike. transformers raises dt to at least `time_step_min` in its chunk scan, which neither the published formulas
nor training do; a written config therefore carries a value too small to matter, and the range that dt is drawn from at
initialisation stands in keys of its own (`dt_init_*`), which transformers keeps when it saves the folder again.
"""

import json
import math
from pathlib import Path
from typing import Any

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.config.model import ATTENTION, MAMBA, MLP, ModelConfig

CONFIG_FILE = "config.json"
EXPORTED_TIME_STEP_MIN = 1e-9
BOS_ID, EOS_ID, PAD_ID = 1, 2, 0
STOP_IDS = (2, 11, 12)
"""Base eos, and the published aligned models' turn marks <SPECIAL_11> and <SPECIAL_12>."""

_LAYER_TYPES = {MAMBA: "linear_attention", ATTENTION: "full_attention", MLP: "mlp"}
_LETTERS = {name: letter for letter, name in _LAYER_TYPES.items()} | {"mamba": MAMBA, "attention": ATTENTION}
_MOE = ("moe", "E")

_INTEGERS = {
    "vocab_size": (),
    "hidden_size": (),
    "intermediate_size": (),
    "num_attention_heads": (),
    "num_key_value_heads": ("num_query_groups",),
    "head_dim": ("attention_head_dim",),
    "mamba_num_heads": (),
    "mamba_head_dim": (),
    "ssm_state_size": ("mamba_state_dim",),
    "n_groups": ("mamba_num_groups", "mamba_n_groups"),
    "conv_kernel": ("mamba_d_conv",),
    "chunk_size": ("mamba_chunk_size",),
    "max_position_embeddings": (),
}
"""Field -> other names of the same size in published configs."""
_OPTIONAL_INTEGERS = {"conv_kernel": 4, "chunk_size": 128, "max_position_embeddings": 131072}

_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "mamba_proj_bias": (False,),
    "use_conv_bias": (True,),
    "mamba_hidden_act": ("silu",),
    "mlp_hidden_act": ("relu2",),
    "sliding_window": (None,),
    "attention_dropout": (0,),
    "hidden_dropout": (0,),
    "residual_in_fp32": (False,),
    "num_nextn_predict_layers": (0,),
    "quantization_config": (None,),
    "rope_scaling": (None,),
}
"""Key -> values that this package computes; an absent key means the first."""


def to_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        config: the architecture.
        dtype: of the weights on disk, torch's name without the prefix (`float32`).
    """
    sizes = {name: config.__dict__[name] for name in _INTEGERS}
    return sizes | {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": config.hybrid_layer_pattern,
        "layers_block_type": [_LAYER_TYPES[letter] for letter in config.hybrid_layer_pattern],
        "num_hidden_layers": config.num_hidden_layers,
        "tie_word_embeddings": config.tie_word_embeddings,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "rescale_prenorm_residual": True,
        "time_step_min": EXPORTED_TIME_STEP_MIN,
        "time_step_max": config.dt_init_max,
        "time_step_floor": config.dt_init_floor,
        "dt_init_min": config.dt_init_min,
        "dt_init_max": config.dt_init_max,
        "dt_init_floor": config.dt_init_floor,
        "mamba_ssm_cache_dtype": "float32",
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "use_conv_bias": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "mamba_proj_bias": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "residual_in_fp32": False,
        "sliding_window": None,
        "use_cache": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def generation_json(config: ModelConfig) -> dict[str, Any]:
    """Return the content of generation_config.json: the published sampling of reasoning models."""
    return {
        "bos_token_id": BOS_ID,
        "eos_token_id": [token for token in STOP_IDS if token < config.vocab_size],
        "pad_token_id": PAD_ID,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    }


def read_config_json(folder: Path) -> dict[str, Any]:
    """Read config.json of a NemotronH folder.

    Raises:
        MissingInputError: the folder or the file is missing.
        UserError: the file is not JSON, or describes another kind of model.
    """
    if not folder.is_dir():
        raise MissingInputError(f"{folder} is not a folder; give a checkpoint folder, which holds {CONFIG_FILE}.")
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise MissingInputError(f"{file} is missing; a checkpoint folder holds {CONFIG_FILE} and *.safetensors.")
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); write the folder again.") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"{file} has no `model_type`; a checkpoint of this package says nemotron_h.")
    if content["model_type"] != "nemotron_h":
        raise UserError(f"{file}: `model_type` is {content['model_type']!r}; only nemotron_h models can be read.")
    return content


def from_json(content: dict[str, Any], file: Path) -> ModelConfig:
    """Return the architecture that a config.json describes, ours or a published one.

    Args:
        content: of the file, as `read_config_json` returns it.
        file: for messages.

    Raises:
        UserError: a key is missing, malformed, contradicts another, or asks for something that is not implemented.
    """
    _refuse_unsupported(content, file)
    sizes = {name: _integer(content, name, others, file) for name, others in _INTEGERS.items()}
    config = ModelConfig(
        hybrid_layer_pattern=_pattern(content, file),
        **sizes,
        tie_word_embeddings=_boolean(content, "tie_word_embeddings", False, file),
        layer_norm_epsilon=_number(content, ("layer_norm_epsilon", "rms_norm_eps"), 1e-5, file),
        initializer_range=_number(content, ("initializer_range",), 0.02, file),
        **_dt_range(content, file),
    )
    config.validate(str(file))
    return config


def config_changes(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return which keys of an imported config.json are written with another value, and why; {} for our own."""
    floor = content.get("time_step_min", 0.001)
    if floor == EXPORTED_TIME_STEP_MIN:
        return {}
    why = "transformers raises dt to time_step_min in its chunk scan; the published recurrence does not clamp dt"
    return {"time_step_min": {"from": floor, "to": EXPORTED_TIME_STEP_MIN, "why": why}}


def _refuse_unsupported(content: dict[str, Any], file: Path) -> None:
    for key, allowed in _ONLY_SUPPORTED.items():
        if key in content and content[key] not in allowed:
            raise UserError(f"{file}: `{key}` is {content[key]!r}; only {allowed[0]!r} is implemented.")
    if "time_step_limit" in content:
        limit = content["time_step_limit"]
        numbers = [_float_or_none(value) for value in limit] if isinstance(limit, list | tuple) else []
        if numbers != [0.0, math.inf]:
            raise UserError(f"{file}: `time_step_limit` is {limit!r}; only [0, Infinity] (no clamp) is implemented.")


def _float_or_none(value: Any) -> float | None:
    """Read a number; transformers writes an infinite one as {"__float__": "Infinity"}, others as a string."""
    if isinstance(value, dict) and "__float__" in value:
        value = value["__float__"]
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _pattern(content: dict[str, Any], file: Path) -> str:
    found: dict[str, str] = {}
    for key in ("hybrid_override_pattern", "hybrid_layer_pattern"):
        if content.get(key) is not None:
            found[key] = _checked_letters(content[key], key, file)
    for key in ("layers_block_type", "layer_types"):
        if content.get(key) is not None:
            found[key] = _checked_letters(content[key], key, file)
    if not found:
        raise UserError(
            f"{file}: `hybrid_override_pattern` and `layers_block_type` are both missing; give one of them."
        )
    patterns = set(found.values())
    if len(patterns) > 1:
        told = " and ".join(f"`{key}` says {pattern}" for key, pattern in found.items())
        raise UserError(f"{file}: {told}; they must agree.")
    (pattern,) = patterns
    if content.get("num_hidden_layers", len(pattern)) != len(pattern):
        raise UserError(
            f"{file}: `num_hidden_layers` ({content['num_hidden_layers']!r}) must equal the length of the layer pattern"
            f" {pattern} ({len(pattern)})."
        )
    return pattern


def _checked_letters(value: Any, key: str, file: Path) -> str:
    names: list[Any] = list(value) if isinstance(value, str | list) else [value]
    letters = []
    for name in names:
        if name in _MOE:
            raise UserError(f"{file}: `{key}` holds mixture-of-experts layers ({name!r}); they are not implemented.")
        letter = _LETTERS.get(name, name) if isinstance(name, str) else None
        if letter not in _LAYER_TYPES:
            raise UserError(
                f"{file}: `{key}` holds {name!r}; layers are M or linear_attention, * or full_attention, - or mlp."
            )
        letters.append(letter)
    if not letters:
        raise UserError(f"{file}: `{key}` is empty; it names one mixer a layer.")
    return "".join(letters)


def _integer(content: dict[str, Any], name: str, others: tuple[str, ...], file: Path) -> int:
    present = [key for key in (name, *others) if content.get(key) is not None]
    if not present:
        if name in _OPTIONAL_INTEGERS:
            return _OPTIONAL_INTEGERS[name]
        raise UserError(f"{file}: `{name}` is missing; the architecture cannot be told without it.")
    for key in present:
        if isinstance(content[key], bool) or not isinstance(content[key], int):
            raise UserError(f"{file}: `{key}` ({content[key]!r}) must be an integer.")
        if content[key] != content[present[0]]:
            raise UserError(
                f"{file}: `{present[0]}` ({content[present[0]]}) and `{key}` ({content[key]}) must be equal."
            )
    return content[present[0]]


def _boolean(content: dict[str, Any], key: str, default: bool, file: Path) -> bool:
    value = content.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{file}: `{key}` ({value!r}) must be true or false.")
    return value


def _number(content: dict[str, Any], keys: tuple[str, ...], default: float, file: Path) -> float:
    for key in keys:
        if content.get(key) is not None:
            value = content[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{file}: `{key}` ({value!r}) must be a finite number.")
            return float(value)
    return default


def _dt_range(content: dict[str, Any], file: Path) -> dict[str, float]:
    """Return the range that dt is drawn from: our own keys, else the published ones, else the published defaults."""
    if "dt_init_min" in content or content.get("time_step_min") == EXPORTED_TIME_STEP_MIN:
        low = _number(content, ("dt_init_min",), 0.001, file)
        high = _number(content, ("dt_init_max", "time_step_max"), 0.1, file)
        floor = _number(content, ("dt_init_floor", "time_step_floor"), 1e-4, file)
    else:
        low = _number(content, ("time_step_min",), 0.001, file)
        high = _number(content, ("time_step_max",), 0.1, file)
        floor = _number(content, ("time_step_floor",), 1e-4, file)
    # A floor above the minimum cuts the drawn range, so the two together mean the larger one.
    low = max(low, floor)
    return {"dt_init_min": low, "dt_init_max": max(high, low), "dt_init_floor": floor}
