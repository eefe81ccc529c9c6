"""The plan of a recipe: what it prints, and that nothing has to exist for it."""

import pytest

from nanotrain.config.errors import UserError
from nanotrain.config.load import load_recipe
from nanotrain.pipeline.plan import plan_recipe
from nanotrain.planning.flops import training_flops_per_token


def test_the_published_run_on_1024_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipes/nemotron_nano_v2/pretrain.yaml")
    text = "\n".join(plan_recipe(recipe, 1024))
    assert "12,310,001,152 parameters, 62 layers" in text
    assert "3,317,128 x 736 sequences x 8,192 = 2e+13 tokens, 6,029,312 a step" in text
    assert "1.44e+24 in all" in text  # the model card: 1.45e24
    assert "1024 ranks = tensor 8 x pipeline 4 x context 1 x data 32; 23 micro-batches of 1 a step" in text
    assert [line.split()[1] for line in text.splitlines()[-4:]] == ["0-16", "17-32", "33-49", "50-61"]
    assert plan_recipe(recipe, None)[4].startswith("layout   32 ranks")
    with pytest.raises(UserError, match=r"must divide the number of ranks \(1000\); what works: 920 ranks with"):
        plan_recipe(recipe, 1000)
    assert list(tmp_path.iterdir()) == []


def test_other_engines_and_entries_that_are_not_known_yet(load):
    lines = plan_recipe(load("pipeline"), None)
    assert lines[0] == "pretrain: engine torch, auto"
    stage = load("pipeline").entries[1].config.stage
    operations = training_flops_per_token(stage.model, stage.training.sequence_length)
    assert f"compute  {operations:.4g} FLOPs a token" in lines[3]
    assert lines[-1] == "model    is known when the entry that makes it has run"
    with pytest.raises(UserError, match="trains nothing"):
        plan_recipe(load("prepare"), None)


def test_a_batch_that_the_ranks_cannot_share_is_refused(load):
    plan_recipe(load("pipeline"), 2)
    with pytest.raises(UserError, match=r"`pretrain\.stage.training.global_batch_size` \(2\) .* x 3 data-parallel"):
        plan_recipe(load("pipeline"), 3)
    wide = ["engine.kind=megatron", "engine.megatron.pipeline_parallel=2"]
    with pytest.raises(UserError, match=r"`distill\.stage.training.global_batch_size` \(3\)"):
        plan_recipe(load("pipeline", *wide, "distill.stage.training.global_batch_size=3"), 4)
