"""A folder with one stage recipe, `toy.yaml`, and a pipeline of two entries."""

from pathlib import Path

import pytest

PRETRAIN = """\
# test
defaults:
  - recipe
  - /stage: pretrain
  - /model@stage.model: quickstart
  - _self_
name: toy
stage:
  curriculum:
    - {until: 0.5, weights: {web: 1}}
    - {until: 1.0, weights: {web: 1, code: 2}}
  training: {steps: 10, global_batch_size: 4, micro_batch_size: 2, sequence_length: 8, learning_rate: 1e-3}
"""

PIPELINE = """\
# test
name: toys
seed: 3
pipeline:
  - {name: prepare, recipe: prepare.yaml}
  - {name: first, recipe: toy.yaml, overrides: [stage.training.steps=20]}
  - {name: second, recipe: toy.yaml, overrides: [seed=8]}
"""

PREPARE = "defaults: [recipe, {/stage: prepare}, _self_]\nname: toy\nstage: {corpus: {vocab_size: 8192}}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(PRETRAIN)
    (tmp_path / "prepare.yaml").write_text(PREPARE)
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path
