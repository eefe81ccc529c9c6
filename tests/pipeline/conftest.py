"""A small run: recipes on disk, and stage functions that work like real ones in milliseconds."""

from pathlib import Path

import pytest

from nanotrain.config.load import LoadedRecipe, load_recipe

CORPUS = "stage: {corpus: {vocab_size: 2000}}"
MODEL = (
    "{hybrid_layer_pattern: M-, vocab_size: 2000, hidden_size: 8, intermediate_size: 8, num_attention_heads: 2,"
    " num_key_value_heads: 1, head_dim: 4, mamba_num_heads: 2, mamba_head_dim: 4, ssm_state_size: 4, n_groups: 1}"
)
TRAINING = "{steps: 3, global_batch_size: 2, micro_batch_size: 1, sequence_length: 4, learning_rate: 1e-3}"
CURRICULUM = "[{until: 1.0, weights: {web: 1}}]"
STAGES = {
    "prepare": CORPUS,
    "pretrain": f"stage: {{model: {MODEL}, curriculum: {CURRICULUM}, training: {TRAINING}}}",
    "prune": "stage: {calibration_samples: 2}",
    "distill": f"stage: {{teacher_from: pretrain, curriculum: {CURRICULUM}, training: {TRAINING}}}",
    "evaluate": "stage: {sequence_length: 8, num_prompts: 2, max_new_tokens: 4}",
}


def write_family(folder: Path) -> None:
    """Write `family/<stage>.yaml` and `family/pipeline.yaml` below `folder`."""
    family = folder / "family"
    family.mkdir()
    for name, body in STAGES.items():
        text = f"# test\ndefaults: [recipe, {{/stage: {name}}}, _self_]\nname: toy\n{body}\n"
        (family / f"{name}.yaml").write_text(text)
    entries = "".join(f"  - {{name: {name}, recipe: {name}.yaml}}\n" for name in STAGES)
    (family / "pipeline.yaml").write_text(f"name: toy\nseed: 1\npipeline:\n{entries}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the toy family."""
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path)
    return tmp_path


@pytest.fixture
def load(folder: Path):
    """Load `family/<name>.yaml` with overrides."""

    def load_named(name: str, *overrides: str) -> LoadedRecipe:
        return load_recipe(folder / "family" / f"{name}.yaml", list(overrides))

    return load_named
