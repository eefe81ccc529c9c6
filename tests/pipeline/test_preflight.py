import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from nanotrain.config.errors import UserError
from nanotrain.pipeline.inputs import resolve_inputs
from nanotrain.pipeline.preflight import Preflight
from nanotrain.pipeline.run import run_pipeline
from nanotrain.planning.parameters import count_parameters
from tests.pipeline.fake_stages import FakeStages, build_report


def check(recipe) -> None:
    Preflight(recipe, resolve_inputs(recipe)).check()


def test_a_tokenizer_larger_than_the_model_is_refused(load):
    check(load("pipeline", "pretrain.stage.model.vocab_size=2048"))  # padding is fine
    with pytest.raises(UserError, match=r"`pretrain\.stage\.model\.vocab_size`.* 1999 tokens.*prepare|previous.*2000"):
        check(load("pipeline", "pretrain.stage.model.vocab_size=1999"))


def test_teacher_and_student_must_share_a_vocabulary(load, folder):
    file = folder / "family" / "pipeline.yaml"
    text = file.read_text().replace(
        "  - {name: distill, recipe: distill.yaml}",
        "  - {name: teacher, recipe: pretrain.yaml, overrides: [stage.model.vocab_size=2100]}\n"
        "  - {name: distill, recipe: distill.yaml, overrides: [stage.teacher_from=teacher, stage.init_from=prune]}",
    )
    file.write_text(text)
    with pytest.raises(UserError, match=r"`distill\.stage\.teacher_from` \(teacher\).* 2100 .*\(prune\) one of 2000"):
        check(load("pipeline"))


def test_vocabularies_of_finished_products_are_known_too(load):
    run_pipeline(load("pipeline"), FakeStages().table, report=build_report)
    check(load("distill"))
    config = Path("runs/toy/pretrain/hf/config.json")
    config.write_text('{"vocab_size": 77}')
    with pytest.raises(UserError, match=r"`stage\.teacher_from` \(pretrain\) has a vocabulary of 77"):
        check(load("distill"))
    config.write_text("{}")
    with pytest.raises(UserError, match=r"config\.json states no vocab_size"):
        check(load("distill"))
    with pytest.raises(UserError, match=r"1500 tokens, but the tokenizer of `stage\.data_from` \(previous\) has 2000"):
        check(load("pretrain", "stage.model.vocab_size=1500"))


def test_a_disk_that_is_too_small_is_refused_by_what_is_still_to_be_made(load, monkeypatch):
    usage = namedtuple("usage", "total used free")
    recipe = load("pipeline")
    parameters = count_parameters(recipe.entries[1].config.stage.model)
    # pretrain and distill: a checkpoint and 3 states of 3 tensors each; prune and evaluate: one checkpoint's room each.
    needed = parameters * 4 * (10 + 1 + 10 + 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    check(recipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(UserError, match=r"`output_dir` \(runs/toy\) lies on a disk with"):
        check(recipe)


def test_layouts_are_refused_before_anything_starts(load, monkeypatch):
    """The pretrained model is known from the recipe, the student of a finished run from its checkpoint."""
    wide = ("engine.kind=megatron", "engine.megatron.tensor_parallel=2")
    with pytest.raises(UserError, match=r"`engine\.megatron\.tensor_parallel` \(2\) must divide .*`n_groups` \(1\)"):
        check(load("pipeline", *wide))
    two = ("engine.kind=megatron", "engine.megatron.pipeline_parallel=2")
    with pytest.raises(UserError, match=r"= 2 must divide the number of ranks \(1\); what works: 1 rank with"):
        check(load("pipeline", *two))
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    check(load("pipeline", *two))
    with pytest.raises(UserError, match=r"`distill\.stage\.training\.global_batch_size` \(3\) must be divisible by"):
        check(load("pipeline", "engine.kind=megatron", "distill.stage.training.global_batch_size=3"))
