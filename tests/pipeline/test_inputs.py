from pathlib import Path

import pytest

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.pipeline.inputs import resolve_inputs
from nanotrain.pipeline.run import run_pipeline
from tests.pipeline.fake_stages import FakeStages, build_report


def refs(recipe, entry: str) -> dict[str, str]:
    return {ref.key: ref.entry or str(ref.folder) for ref in resolve_inputs(recipe)[entry]}


def finish(recipe) -> None:
    run_pipeline(recipe, FakeStages().table, report=build_report)


def test_previous_is_the_nearest_earlier_entry_of_the_kind(load):
    pipeline = load("pipeline")
    assert refs(pipeline, "pretrain") == {"data_from": "prepare"}
    assert refs(pipeline, "evaluate") == {"init_from": "distill", "data_from": "prepare"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "distill.stage.teacher_from=pretrian",
            r"`distill\.stage\.teacher_from` \(pretrian\).*did you mean 'pretrain'",
        ),
        ("distill.stage.teacher_from=prepare", "leaves a data folder, but a checkpoint is needed; .*pretrain"),
        ("distill.stage.data_from=prune", "leaves a checkpoint, but a data folder is needed.*prepare"),
        ("prune.stage.init_from=distill", "names a later entry"),
        ("prune.stage.init_from=prune", "is the entry itself"),
        ("prune.stage.init_from=''", r"\(\) is neither"),
        ("prune.stage.init_from=/nowhere", r"\(/nowhere\) is neither an earlier entry nor a folder"),
    ],
)
def test_names_are_checked_before_anything_runs(load, override, words):
    with pytest.raises(UserError, match=words):
        resolve_inputs(load("pipeline", override))


def test_previous_without_an_earlier_entry(load, folder):
    file = folder / "family" / "pipeline.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "name: prepare" not in line))
    with pytest.raises(MissingInputError, match=r"`pretrain\.stage\.data_from` is `previous`, but no earlier entry"):
        resolve_inputs(load("pipeline"))


def test_alone_the_finished_entries_of_the_run_count(load):
    with pytest.raises(MissingInputError, match=r"`stage\.data_from`.*nanotrain run family/pipeline\.yaml"):
        resolve_inputs(load("pretrain"))
    finish(load("pipeline"))
    assert refs(load("pretrain"), "pretrain") == {"data_from": "prepare"}
    assert refs(load("prune"), "prune") == {"init_from": "pretrain", "data_from": "prepare"}  # not distill: it is later
    explicit = load("prune", "stage.init_from=distill")
    assert refs(explicit, "prune") == {"init_from": "distill", "data_from": "prepare"}


def test_alone_without_a_pipeline_the_last_finished_counts(load):
    for name in ("prepare", "pretrain", "prune"):
        finish(load(name))
    assert refs(load("distill"), "distill")["init_from"] == "prune"
    with pytest.raises(
        MissingInputError, match=r"\(distill\) is not finished in runs/toy; run `nanotrain run family/dis"
    ):
        resolve_inputs(load("prune", "stage.init_from=distill"))
    with pytest.raises(MissingInputError, match=r"\(pretraim\).*did you mean 'pretrain'"):
        resolve_inputs(load("prune", "stage.init_from=pretraim"))


def test_folders_are_products_or_finished_entries(load, tmp_path):
    finish(load("pipeline"))
    other = ["output_dir=runs/other", "stage.data_from=runs/toy/prepare/data"]
    by_entry = refs(load("prune", *other, "stage.init_from=runs/toy/pretrain"), "prune")
    by_product = refs(load("prune", *other, "stage.init_from=runs/toy/pretrain/hf"), "prune")
    assert by_entry == by_product == {"init_from": "runs/toy/pretrain/hf", "data_from": "runs/toy/prepare/data"}
    with pytest.raises(UserError, match="holds a data folder, but a checkpoint is needed"):
        resolve_inputs(load("prune", *other, "stage.init_from=runs/toy/prepare"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(MissingInputError, match=r"no config\.json"):
        resolve_inputs(load("prune", *other, f"stage.init_from={empty}"))
    (empty / "config.json").write_text("{")
    with pytest.raises(MissingInputError, match=r"no \*\.safetensors"):
        resolve_inputs(load("prune", *other, f"stage.init_from={empty}"))
    (empty / "model.safetensors").write_text("")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        resolve_inputs(load("prune", *other, f"stage.init_from={empty}"))
    with pytest.raises(MissingInputError, match=r"no manifest\.json"):
        resolve_inputs(
            load("prune", "output_dir=runs/other", f"stage.data_from={empty}", "stage.init_from=runs/toy/prune")
        )


def test_an_optional_input_that_is_not_asked_for_is_none(load):
    assert "architecture_from" not in refs(load("pipeline"), "pretrain")
    Path("family/baseline.yaml").write_text(
        Path("family/pipeline.yaml").read_text()
        + "  - {name: scratch, recipe: pretrain.yaml, overrides: [stage.architecture_from=prune]}\n"
    )
    assert refs(load("baseline"), "scratch") == {"data_from": "prepare", "architecture_from": "prune"}
