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


def check(recipe, world_size: int = 1) -> None:
    preflight = Preflight(recipe, resolve_inputs(recipe))
    preflight.check()
    for entry in recipe.entries:
        preflight.check_ranks(entry, world_size)


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


def test_layouts_are_refused_before_anything_starts(load):
    """The pretrained model is known from the recipe, the student of a finished run from its checkpoint."""
    wide = ("engine.kind=megatron", "engine.megatron.tensor_parallel=2")
    with pytest.raises(UserError, match=r"`engine\.megatron\.tensor_parallel` \(2\) must divide .*`n_groups` \(1\)"):
        check(load("pipeline", *wide))
    two = ("engine.kind=megatron", "engine.megatron.pipeline_parallel=2")
    with pytest.raises(UserError, match=r"= 2 must divide the number of ranks \(1\); what works: 1 rank with"):
        check(load("pipeline", *two))
    check(load("pipeline", *two), world_size=2)
    with pytest.raises(UserError, match=r"`distill\.stage\.training\.global_batch_size` \(3\) must be divisible by"):
        check(load("pipeline", "engine.kind=megatron", "distill.stage.training.global_batch_size=3"), world_size=2)


ENGINES = {
    "torch": [],
    "ddp": ["engine.data_parallel=ddp"],
    "fsdp2": ["engine.data_parallel=fsdp2"],
    "deepspeed": ["engine.kind=deepspeed"],
    "megatron": ["engine.kind=megatron"],
}


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_batch_that_the_ranks_cannot_share_is_refused_by_every_engine(load, engine):
    """Also that of a later entry, whose model no recipe states; phases of a curriculum share one batch."""
    batch = ["distill.stage.training.global_batch_size=12", "distill.stage.training.micro_batch_size=2"]
    phases = "pretrain.stage.curriculum=[{until: 0.5, weights: {web: 1}}, {until: 1.0, weights: {code: 1}}]"
    recipe = load("pipeline", *ENGINES[engine], *batch, "pretrain.stage.training.global_batch_size=16", phases)
    for ranks in (1, 2):
        check(recipe, ranks)
    with pytest.raises(UserError) as error:
        check(recipe, 4)
    message = str(error.value)
    assert message.startswith(
        "`distill.stage.training.global_batch_size` (12) must be divisible by `micro_batch_size` (2) x 4 data-parallel"
        " ranks; "
    )
    assert "`distill.stage.training.global_batch_size` to 8 or 16" in message
    with pytest.raises(UserError, match=r"`pretrain\.stage\.training\.global_batch_size` \(16\).* x 3 data-parallel"):
        check(recipe, 3)


def test_megatron_counts_the_ranks_of_one_model_once(load):
    recipe = load("pipeline", "engine.kind=megatron", "engine.megatron.pipeline_parallel=2")
    check(recipe, 4)
    with pytest.raises(UserError, match=r"x 4 data-parallel ranks"):
        check(recipe, 8)
    with pytest.raises(UserError, match=r"= 2 must divide the number of ranks \(3\)"):
        check(recipe, 3)


def test_ranks_are_checked_for_what_is_still_to_be_made_only(load, monkeypatch):
    """A run that continues on other ranks is not held up by a training that is finished."""
    recipe = load("pipeline", "pretrain.stage.training.global_batch_size=3")
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    stages = FakeStages()
    with pytest.raises(UserError, match=r"x 2 data-parallel ranks; .* to 2 or 4, or use 1 or 3 data-parallel ranks"):
        run_pipeline(recipe, stages.table, report=build_report)
    assert not Path("runs/toy").exists()
    monkeypatch.setenv("WORLD_SIZE", "3")
    run_pipeline(recipe, stages.table, report=build_report, only="prepare")
    run_pipeline(recipe, stages.table, report=build_report, only="pretrain")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_pipeline(recipe, stages.table, report=build_report)
