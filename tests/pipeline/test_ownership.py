import json
from pathlib import Path

import pytest

from nanotrain.config.errors import UserError
from nanotrain.pipeline.ownership import check_ownership, owned_folder


def claim(recipe) -> None:
    with owned_folder(recipe):
        pass


def test_an_absent_or_empty_folder_is_taken_and_checking_writes_nothing(load):
    recipe = load("pipeline")
    check_ownership(recipe)
    assert not Path("runs").exists()
    Path("runs/toy").mkdir(parents=True)
    claim(recipe)
    owner = json.loads(Path("runs/toy/run.json").read_text())
    assert owner["recipe_name"] == "toy" and owner["order"][0] == "prepare"


def test_a_folder_with_foreign_files_is_refused(load):
    Path("runs/toy").mkdir(parents=True)
    Path("runs/toy/thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"runs/toy\) is not empty.*thesis\.tex"):
        check_ownership(load("pipeline"))
    Path("runs/toy/thesis.tex").rename("file")
    with pytest.raises(UserError, match=r"file is a file"):
        check_ownership(load("pipeline", "output_dir=file/below"))


def test_another_recipe_is_refused_and_named(load, folder):
    claim(load("pipeline"))
    family = folder / "family"
    other = family / "other.yaml"
    other.write_text((family / "pipeline.yaml").read_text())
    with pytest.raises(UserError, match=r"belongs to the pipeline family/pipeline\.yaml, not to family/other\.yaml"):
        claim(load("other"))
    other.write_text(other.read_text().replace("name: toy", "name: renamed"))
    with pytest.raises(UserError, match="belongs to the recipe named 'toy'"):
        claim(load("other", "output_dir=runs/toy"))
    with pytest.raises(UserError, match="belongs to the recipe named 'toy'"):
        claim(load("other", "output_dir=runs/toy", "name=toy"))  # a run's name does not make it another recipe
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "prepare.yaml").write_text((family / "prepare.yaml").read_text())
    from nanotrain.config.load import load_recipe

    with pytest.raises(UserError, match=r"entry 'prepare' is family/prepare\.yaml"):
        claim(load_recipe("elsewhere/prepare.yaml"))


def test_stage_recipes_of_the_family_share_the_folder_under_any_run_name(load):
    claim(load("pipeline"))
    claim(load("distill"))
    claim(load("pipeline", "name=second", "output_dir=runs/toy"))
    assert json.loads(Path("runs/toy/run.json").read_text())["name"] == "second"


def test_the_lock_is_free_again_after_the_block(load):
    recipe = load("prepare")
    claim(recipe)
    claim(recipe)


def test_a_folder_without_permission_is_refused(load, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission"):
        check_ownership(load("pipeline"))
