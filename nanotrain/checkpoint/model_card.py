"""The README.md of a checkpoint folder."""

from nanotrain.checkpoint.provenance import Provenance
from nanotrain.config.model import ATTENTION, MAMBA, MLP, ModelConfig
from nanotrain.planning.parameters import count_non_embedding_parameters, count_parameters

_USE = """## Use

```python
import torch
from nanotrain.checkpoint.hf_folder import load_model

logits = load_model(".")(torch.tensor([[1, 2, 3]]))  # [batch, sequence, vocabulary]
```

transformers 5 reads the folder with its own `NemotronHForCausalLM`; no remote code is needed. `time_step_min` in
config.json is set so low on purpose: transformers raises dt to it, and this model's dt is never clamped.
"""


def model_card(config: ModelConfig, dtype: str, provenance: Provenance | None) -> str:
    """Return the text: what the model is, where it comes from, how it is used.

    Args:
        config: the architecture.
        dtype: of the weights on disk.
        provenance: None when nothing is known.
    """
    pattern = config.hybrid_layer_pattern
    rows = {
        "parameters": f"{count_parameters(config):,} ({count_non_embedding_parameters(config):,} without embeddings)",
        "layers": f"`{pattern}`: {pattern.count(MAMBA)} Mamba-2, {pattern.count(ATTENTION)} attention,"
        f" {pattern.count(MLP)} MLP",
        "hidden size": config.hidden_size,
        "MLP size": config.intermediate_size,
        "attention": f"{config.num_attention_heads} query heads, {config.num_key_value_heads} key-value heads,"
        f" head size {config.head_dim}, no position embedding",
        "Mamba-2": f"{config.mamba_num_heads} heads of {config.mamba_head_dim}, {config.n_groups} groups,"
        f" state size {config.ssm_state_size}",
        "vocabulary": f"{config.vocab_size:,}, {'tied' if config.tie_word_embeddings else 'untied'} embeddings",
        "weights": dtype,
    }
    parts = ["# Hybrid Mamba-2 language model\n", _table(rows)]
    if provenance is not None:
        parts += ["## Origin\n", _table(_origin(provenance))]
        if provenance.metrics:
            parts += ["## Measured\n", _table({name: f"{value:.6g}" for name, value in provenance.metrics.items()})]
        for key, change in provenance.config_changes.items():
            parts.append(f"`{key}` was {change['from']} in the imported config, now {change['to']}: {change['why']}.\n")
    return "\n".join([*parts, _USE])


def _origin(provenance: Provenance) -> dict[str, object]:
    known = {
        "stage": provenance.stage,
        "parent": provenance.parent,
        "parent digest": provenance.parent_digest,
        "recipe digest": provenance.recipe_digest,
        "seed": provenance.seed,
        "step": provenance.step,
        "tokens seen": provenance.tokens_seen,
        "nanotrain": provenance.package_version,
    }
    return {name: value for name, value in known.items() if value not in ("", None)}


def _table(rows: dict[str, object]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"
