"""The README.md of a checkpoint folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from nanotrain.checkpoint import config_json
from nanotrain.checkpoint.provenance import Provenance, load_provenance
from nanotrain.config.model import ATTENTION, MAMBA, MLP, ModelConfig
from nanotrain.planning.parameters import count_non_embedding_parameters, count_parameters
from nanotrain.runtime.files import write_bytes_atomic

CARD_FILE = "README.md"
_TITLE = "Hybrid Mamba-2 language model"

_FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [nemotron_h, mamba2, hybrid, nanotrain]
---
"""

_USE = """## Use

```python
import torch
from nanotrain.checkpoint.hf_folder import load_model

logits = load_model(".")(torch.tensor([[1, 2, 3]]))  # [batch, sequence, vocabulary]
```

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")
```

transformers 5 reads the folder with its own `NemotronHForCausalLM`; no remote code is needed. `time_step_min` in
config.json is set so low on purpose: transformers raises dt to it, and this model's dt is never clamped.
"""


def write_model_card(folder: Path, *, title: str, facts: Mapping[str, object]) -> None:
    """Write the card of a checkpoint folder again, with a stage's own title and numbers.

    Args:
        folder: a checkpoint folder.
        title: of the card.
        facts: name -> value, shown as they are; floats with six digits. A value that is itself a mapping, a list of
            mappings (rows of a table) or a list of sentences becomes a section named by its key.

    Raises:
        UserError: as `checkpoint.hf_folder.load_config`.
    """
    content = config_json.read_config_json(folder)
    config = config_json.from_json(content, folder / config_json.CONFIG_FILE)
    card = model_card(config, str(content["dtype"]), load_provenance(folder), title=title, facts=facts)
    write_bytes_atomic(folder / CARD_FILE, card.encode())


def model_card(
    config: ModelConfig,
    dtype: str,
    provenance: Provenance | None,
    *,
    title: str = _TITLE,
    facts: Mapping[str, object] | None = None,
) -> str:
    """Return the text: what the model is, what was measured, where it comes from, how it is used.

    Args:
        config: the architecture.
        dtype: of the weights on disk.
        provenance: None when nothing is known.
        title: of the card.
        facts: as for `write_model_card`.
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
    parts = [_FRONT_MATTER, f"# {title}\n", _table(rows)]
    facts = facts or {}
    single = {name: value for name, value in facts.items() if not isinstance(value, (Mapping, list))}
    if single:
        parts += ["## Facts\n", _table(single)]
    for name, value in facts.items():
        if value and isinstance(value, (Mapping, list)):
            parts += [f"## {name}\n", _section(value)]
    if provenance is not None:
        parts += ["## Origin\n", _table(_origin(provenance))]
        if provenance.metrics:
            parts += ["## Measured\n", _table(provenance.metrics)]
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


def _section(value: Mapping[str, object] | Sequence[object]) -> str:
    if isinstance(value, Mapping):
        return _table(value)
    rows = [row for row in value if isinstance(row, Mapping)]
    if not rows:
        return "".join(f"- {_cell(sentence)}\n" for sentence in value)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [_line(columns), "|---" * len(columns) + "|"]
    lines += [_line([row.get(name) for name in columns]) for row in rows]
    return "\n".join(lines) + "\n"


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *[_line([name, value]) for name, value in rows.items()]]) + "\n"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(_cell(cell).replace("|", "\\|") for cell in cells) + " |"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return " ".join((f"{value:.6g}" if isinstance(value, float) else str(value)).split())
