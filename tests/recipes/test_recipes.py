import re
import shlex
from pathlib import Path

import pytest

from nanotrain.config.load import load_recipe
from nanotrain.config.shipped import package_folder
from nanotrain.config.stage import PretrainConfig
from nanotrain.pipeline.inputs import resolve_inputs
from nanotrain.pipeline.preflight import Preflight

ROOT = Path(__file__).parents[2]
RECIPES = sorted(package_folder("recipes").rglob("*.yaml"))
CONFIGS = sorted(package_folder("configs").glob("*/*.yaml"))
"""Choices of groups; deeper folders hold files that programs read (components, blends), with tests of their own."""
PLACES = {"model": "model@stage.model", "optimizer": "+optimizer@stage.training.optimizer"}


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("file", RECIPES, ids=label)
def test_every_recipe_composes_and_says_what_it_is(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and first.endswith(".") and len(first) > 40
    recipe = load_recipe(file)
    if recipe.is_pipeline:
        Preflight(recipe, resolve_inputs(recipe)).check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", CONFIGS, ids=label)
def test_every_group_choice_composes_and_says_what_it_is(file):
    group, choice = file.parent.name, file.stem
    assert file.read_text(encoding="utf-8").startswith("# ")
    if group == "data":
        recipe = load_recipe("recipes/quickstart/prepare.yaml", [f"+data@stage.corpus={choice}"])
    else:
        recipe = load_recipe("recipes/quickstart/pretrain.yaml", [f"{PLACES.get(group, group)}={choice}"])
    assert recipe.entries


def test_the_quickstart_is_the_pipeline_that_the_readme_promises():
    recipe = load_recipe("recipes/quickstart/pipeline.yaml")
    assert [entry.name for entry in recipe.entries] == [
        "prepare",
        "pretrain",
        "prune",
        "distill",
        "sft",
        "evaluate",
        "export",
    ]
    inputs = {name: {ref.key: ref.entry for ref in refs} for name, refs in resolve_inputs(recipe).items()}
    assert inputs["distill"] == {"init_from": "prune", "teacher_from": "pretrain", "data_from": "prepare"}
    assert inputs["export"]["init_from"] == inputs["evaluate"]["init_from"] == "sft"
    pretrain = recipe.entries[1].config.stage
    assert isinstance(pretrain, PretrainConfig) and len(pretrain.curriculum) == 3
    for entry in recipe.entries:  # work is saved at least every ten seconds
        training = entry.resolved["stage"].get("training")
        assert training is None or training["save_interval_seconds"] <= 10


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(
    {
        match.strip()
        for document in DOCUMENTS
        for match in re.findall(r"nanotrain run (recipes/[^\n`#]*)", document.read_text(encoding="utf-8"))
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_documents_name_recipes_and_keys_that_exist(command):
    words = [word for word in shlex.split(command) if not word.startswith("-") and "..." not in word]
    recipe, overrides = words[0], [word for word in words[1:] if "=" in word and "," not in word]
    assert load_recipe(ROOT / recipe, overrides).entries


def test_scripts_named_in_the_documents_exist():
    for document in DOCUMENTS:
        for script in re.findall(r"(?<![\w/])((?:launch|\.ci)/[\w.]+)", document.read_text(encoding="utf-8")):
            assert (ROOT / script.rstrip(".")).exists(), f"{document.name} names {script}"
