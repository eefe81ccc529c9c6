import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanotrain.config import load as module
from nanotrain.config.data import PhaseConfig
from nanotrain.config.engine import Device, EngineKind, TrackerKind
from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.config.load import expand_sweeps, find_recipe, load_recipe
from nanotrain.config.model import ModelConfig
from nanotrain.config.shipped import package_folder
from nanotrain.config.stage import PRODUCT_KINDS, STAGE_CONFIGS, PretrainConfig, StageConfig
from nanotrain.config.training import ScheduleKind, TrainingConfig


def stage(recipe, index: int = 0) -> PretrainConfig:
    config = recipe.entries[index].config.stage
    assert isinstance(config, PretrainConfig)
    return config


def test_a_stage_recipe_becomes_real_dataclasses(folder):
    recipe = load_recipe("toy.yaml", ["stage.training.schedule={kind:cosine,warmup_steps:2}", "engine=torch_cpu"])
    entry = recipe.entries[0]
    assert (entry.name, recipe.is_pipeline, recipe.output_dir) == ("toy", False, Path("runs/toy"))
    config = stage(recipe)
    assert type(config.training) is TrainingConfig and type(config.model) is ModelConfig
    assert config.curriculum == [PhaseConfig(0.5, {"web": 1.0}), PhaseConfig(1.0, {"web": 1.0, "code": 2.0})]
    assert config.training.learning_rate == 1e-3 and config.training.schedule.kind is ScheduleKind.cosine
    assert entry.config.engine.kind is EngineKind.torch and entry.config.engine.device is Device.cpu
    assert entry.resolved["stage"]["training"]["schedule"]["kind"] == "cosine"
    assert entry.resolved["output_dir"] == "runs/toy"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("stage.training.steps=5", lambda s: s.training.steps, 5),
        ("++stage.training.steps=5", lambda s: s.training.steps, 5),
        ("stage.curriculum.0.until=0.25", lambda s: s.curriculum[0].until, 0.25),
        ("+stage.curriculum.0.weights.code=3", lambda s: s.curriculum[0].weights, {"web": 1.0, "code": 3.0}),
        ("stage.curriculum=[{until:1.0,weights:{math:2}}]", lambda s: s.curriculum, [PhaseConfig(1.0, {"math": 2.0})]),
        ("~stage.curriculum.0.weights.web", lambda s: s.curriculum[0].weights, None),
        ("stage.data_from='a b=c'", lambda s: s.data_from, "a b=c"),
        ("stage.training.steps=${seed}", lambda s: s.training.steps, 1),
        ("model@stage.model=nemotron_nano_9b_v2", lambda s: s.model.hidden_size, 4480),
        ("stage.model.tie_word_embeddings=true", lambda s: s.model.tie_word_embeddings, True),
    ],
)
def test_hydras_override_grammar(folder, override, read, value):
    if value is None:  # the only weight is gone: a rule of ours refuses, so the deletion has taken place
        with pytest.raises(UserError, match="at least one weight above 0"):
            load_recipe("toy.yaml", [override])
    else:
        assert read(stage(load_recipe("toy.yaml", [override]))) == value


@pytest.mark.parametrize("line", ["/engine: torch_cpu", "override /engine: torch_cpu"])
def test_a_recipe_may_choose_its_engine_and_the_command_line_still_wins(folder, line):
    text = (folder / "toy.yaml").read_text()
    (folder / "toy.yaml").write_text(text.replace("  - _self_", f"  - {line}\n  - _self_"))
    assert load_recipe("toy.yaml").entries[0].config.engine.device is Device.cpu
    assert load_recipe("toy.yaml", ["engine=torch"]).entries[0].config.engine.device is Device.auto


def test_a_recipe_may_start_from_another(folder):
    (folder / "child.yaml").write_text("defaults: [toy, _self_]\nstage: {training: {steps: 77}}\n")
    recipe = load_recipe("child.yaml")
    assert stage(recipe).training.steps == 77 and recipe.name == recipe.declared_name == "toy"


def test_a_pipeline_hands_name_seed_and_output_dir_down(folder):
    recipe = load_recipe("pipeline.yaml")
    assert [entry.name for entry in recipe.entries] == ["prepare", "first", "second"]
    assert {entry.config.name for entry in recipe.entries} == {"toys"}
    assert {entry.config.output_dir for entry in recipe.entries} == {"runs/toys"}
    assert [entry.config.seed for entry in recipe.entries] == [3, 3, 8]
    assert [stage(recipe, i).training.steps for i in (1, 2)] == [20, 10]


def test_overrides_of_a_pipeline_reach_whom_they_name(folder):
    recipe = load_recipe(
        "pipeline.yaml",
        [
            "seed=5",
            "name=mine",
            "output_dir='/tmp/a=b, c'",
            "engine=torch_cpu",
            "engine.threads=2",
            "tracking=trackio",
            "first.stage.training.steps=7",
            "second.seed=9",
            "second.engine.threads=1",
        ],
    )
    assert (recipe.name, str(recipe.output_dir), recipe.declared_name) == ("mine", "/tmp/a=b, c", "toys")
    assert [entry.config.seed for entry in recipe.entries] == [5, 5, 9]
    assert [entry.config.engine.threads for entry in recipe.entries] == [2, 2, 1]
    assert all(entry.config.engine.device is Device.cpu for entry in recipe.entries)
    assert all(entry.config.tracking.kind is TrackerKind.trackio for entry in recipe.entries)
    assert [stage(recipe, i).training.steps for i in (1, 2)] == [7, 10]


def test_a_seed_in_a_stage_recipe_is_its_own(folder):
    (folder / "toy.yaml").write_text((folder / "toy.yaml").read_text() + "seed: 4\n")
    assert [entry.config.seed for entry in load_recipe("pipeline.yaml", ["seed=6"]).entries] == [6, 4, 8]


def test_a_stage_means_the_same_alone_and_in_its_pipeline(folder):
    (folder / "pipeline.yaml").write_text("name: toy\npipeline: [{name: toy, recipe: toy.yaml}]\n")
    assert load_recipe("pipeline.yaml").entries[0].resolved == load_recipe("toy.yaml").entries[0].resolved


def test_the_printed_recipe_composes_to_itself(folder):
    """--cfg prints keys as the command line takes them: giving one back changes exactly that value."""
    recipe = load_recipe("toy.yaml")
    text = recipe.to_yaml()
    body = text.replace("name: toy", "defaults: [recipe, {/stage: pretrain}, _self_]\nname: toy", 1)
    (folder / "again.yaml").write_text(body)
    assert load_recipe("again.yaml").entries[0].resolved == recipe.entries[0].resolved
    pipeline = load_recipe("pipeline.yaml").to_yaml()
    assert re.search(r"^first:\n  seed: 3$", pipeline, re.MULTILINE) and "output_dir: runs/toys" in pipeline


def test_sizes_may_be_missing_when_a_checkpoint_gives_the_architecture(folder):
    text = (folder / "toy.yaml").read_text().replace("  - /model@stage.model: quickstart\n", "")
    (folder / "toy.yaml").write_text(text)
    with pytest.raises(UserError, match=r"`stage\.model\.\w+`, .*have no value and no default; set it in toy\.yaml"):
        load_recipe("toy.yaml")
    assert stage(load_recipe("toy.yaml", ["stage.architecture_from=/somewhere"])).architecture_from == "/somewhere"


ALONE = [
    ("stage.trainig.steps=7", r"`stage\.trainig` .* did you mean 'training'"),
    ("stage.training.stepz=7", r"`stage\.training\.stepz` .* did you mean 'steps'"),
    ("engin.device=gpu", r"`engin` .* did you mean 'engine'"),
    ("+stage.foo=1", r"`stage\.foo` is not a key of PretrainConfig"),
    ("++stage.training.stepz=1", r"`stage\.training\.stepz` is not a key of TrainingConfig; did you mean 'steps'"),
    ("+stage.curriculum.0.weigths={}", r"`stage\.curriculum\.0\.weigths` is not a key of PhaseConfig"),
    (
        "stage.curriculum=[{until:1.0,weightz:{web:1}}]",
        r"`stage\.curriculum\[\.\.\.\]\.weightz`.*did you mean 'weights'",
    ),
    ("stage.curriculum.0.weights={wbe:1}", r"`stage\.curriculum\[0\]\.weights\.wbe`.*is not there yet"),
    (
        "+stage.curriculum.0.weights.wbe=1",
        r"`stage\.curriculum\[0\]\.weights\.wbe` is not a source; did you mean 'web'",
    ),
    ("stage.training.steps=abc", r"`stage\.training\.steps` .* is 'abc' but must be a whole number"),
    ("stage.training.steps=6e9", "must be a whole number; write 6000000000"),
    ("stage.training.steps=1.5", "is 1.5 but must be a whole number"),
    ("stage.training.learning_rate=true", "is True but must be a number"),
    ("stage.training.learning_rate=nan", r"`stage\.training\.learning_rate` \(nan\)"),
    ("stage.model.tie_word_embeddings=7.5", "must be true or false"),
    ("stage.training.steps=null", r"`stage\.training\.steps` .* is empty but must be a whole number"),
    ("stage.training=5", "must be a mapping with the keys steps, global_batch_size"),
    ("stage.curriculum=5", r"must be a list \(list\[PhaseConfig\]\)"),
    ("stage.curriculum.9.until=1", r"`stage\.curriculum\[9\]`"),
    ("~stage.training", r"`stage\.training`"),
    ("engine.device=gpu", "is 'gpu' but must be one of auto, cpu, cuda; did you mean 'cpu'"),
    ("engine=torhc", r"`engine=torhc` \(an override\) is not a choice; did you mean 'torch'"),
    ("tracking=wand", "did you mean 'wandb'"),
    ("stage=pretain", "did you mean 'pretrain'"),
    ("model@stage.model=quickstar", "did you mean 'quickstart'"),
    ("stage.model.hidden_size=???", r"`stage\.model\.hidden_size` has no value and no default"),
    ("stage.training.steps=1,2", "add --multirun"),
    ("stage.training.steps", "cannot be read as an override"),
    ("stage.training.steps=[1", "cannot be read as an override"),
    ("output_dir=/tmp/a=b", "quote a value"),
    ("=5", "has no key"),
    ("hydra.verbose=true", "would be ignored"),
    ("name=a/b", r"`name` \('a/b'\) must consist of"),
    ("output_dir=''", "`output_dir` is empty"),
    ("stage.training.steps=${nothing}", r"`stage\.training\.steps`.*'nothing' not found"),
    (
        "stage.training.global_batch_size=5",
        r"`stage\.training\.global_batch_size` \(5\) must be divisible .* to 4 or 6",
    ),
    (
        "stage.model.n_groups=3",
        r"`stage\.model\.mamba_num_heads` \(8\) must be divisible by `stage\.model\.n_groups` \(3\)",
    ),
    (
        "stage.training.schedule.min_learning_rate=1",
        r"min_learning_rate` \(1\.0\) must lie between 0 and `learning_rate`",
    ),
    ("engine.threads=-1", r"`engine\.threads` \(-1\)"),
    (
        "engine.fp8_bf16_last_layers=4",
        r"`engine\.fp8_bf16_last_layers` \(4\) belongs to FP8 .* `engine\.precision` \(auto\)",
    ),
    ("tracking.mode=online", r"`tracking\.mode`"),
    ("first.stage.training.steps=4", r"`first` .* is not a key of RecipeConfig"),
]


@pytest.mark.parametrize(("override", "sentence"), ALONE, ids=[row[0] for row in ALONE])
def test_mistakes_in_overrides(folder, override, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load_recipe("toy.yaml", [override])
    assert "\n" not in str(caught.value)


HEAD = "defaults: [recipe, {/stage: pretrain}, _self_]\nname: x\n"
FILES = [
    (HEAD + "stage: {trainin: {steps: 3}}", r"`stage\.trainin` \(x\.yaml\).* did you mean 'training'"),
    (HEAD + "stage: {training: {steps: abc}}", r"`stage\.training\.steps` \(x\.yaml\) is 'abc'"),
    (HEAD + "stage: {training: }", r"`stage\.training` \(x\.yaml\) is empty"),
    (HEAD + "stage: {training: [1]}", r"`stage\.training` \(x\.yaml\) must be a mapping"),
    (HEAD + "stage: {curriculum: {a: 1}}", r"`stage\.curriculum` \(x\.yaml\) must be a list"),
    (HEAD + "stage: {curriculum: [{until: 1.0, weightz: {}}]}", r"`stage\.curriculum\[0\]\.weightz` .*'weights'"),
    (HEAD + "stage: {curriculum: [{until: 1.0, weights: {web: null}}]}", r"`stage\.curriculum\[0\]\.weights\.web`"),
    (HEAD + "nom: 3", r"`nom` \(x\.yaml\).* did you mean 'name'"),
    (HEAD + "hydra: {verbose: true}", "`hydra` in x.yaml has no place"),
    (HEAD + "engine: {kind: Torch}", "did you mean 'torch'"),
    (HEAD + "stage: {training: {steps: 3}}", r"`stage\.curriculum|has no value|have no value"),
    ("defaults: [recipe, {/stage: pretrin}, _self_]\nname: x", "`stage: pretrin` in `defaults` .*'pretrain'"),
    ("defaults: [recip, {/stage: pretrain}, _self_]\nname: x", "`recip` in `defaults`"),
    ("defaults: [recipe, _self_]\nname: x", "`stage` is not chosen"),
    ("defaults: [{/stage: pretrain}, _self_]\nname: x", "must start with `- recipe`"),
    ("defaults: [recipe, {/stage: pretrain}]\nname: x", "must end with `_self_`"),
    ("defaults: [recipe, {/stage: sft}, {/stage: prune}, _self_]\nname: x", "`stage` is chosen twice"),
    ("defaults: {recipe: x}\nname: x", "must have a list `defaults`"),
    ("name: x", "must have a list `defaults`"),
    ("defaults: [recipe, {/stage: pretrain}, _self_]\n", "`name` has no value"),
    ("- a", "must hold a mapping"),
    ("", "must hold a mapping"),
    ("5", "cannot be read"),
    ("a: [", "not valid YAML"),
    ("a: 1\na: 2", "duplicate key"),
    ("name: p\npipeline: []", "must list at least one entry"),
    ("name: p\npipeline: 5", r"`pipeline` \(x\.yaml\) is 5 but must be a list"),
    ("name: p\npipeline: [{name: a}]", r"`pipeline\[0\]\.recipe` has no value"),
    ("name: p\npipeline: [{nam: a, recipe: toy.yaml}]", r"`pipeline\[0\]\.nam` .*'name'"),
    ("name: p\npipeline: [{name: a, recipe: toys.yaml}]", r"'toys\.yaml' of entry 'a' is not a file.*'toy\.yaml'"),
    ("name: p\npipeline: [{name: a, recipe: x.yaml}]", "must have a list `defaults`"),
    ("name: p\npipeline: [{name: seed, recipe: toy.yaml}]", "must not be one of"),
    ("name: p\npipeline: [{name: a.b, recipe: toy.yaml}]", "letters, digits"),
    ("name: p\npipeline: [{name: a, recipe: toy.yaml}, {name: a, recipe: toy.yaml}]", "entry `a` twice"),
    ("name: p\ndefaults: [recipe]\npipeline: [{name: a, recipe: toy.yaml}]", "takes no `defaults`"),
    ("nam: p\npipeline: [{name: a, recipe: toy.yaml}]", "`nam` .*'name'"),
    ("pipeline: [{name: a, recipe: toy.yaml}]", "`name` has no value"),
]


@pytest.mark.parametrize(("text", "sentence"), FILES)
def test_mistakes_in_files(folder, text, sentence):
    (folder / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        load_recipe("x.yaml")
    assert "\n" not in str(caught.value)


PIPELINE = [
    ("frist.stage.training.steps=5", "did you mean 'first'"),
    ("stage.training.steps=5", r"say whose stage it is, for example `prepare\.stage"),
    ("first=5", "`first=5`"),
    ("first.name=x", "`name` belongs to the whole run"),
    ("first.output_dir=x", "`output_dir` belongs to the whole run"),
    ("outptu_dir=x", "did you mean 'output_dir'"),
    ("pipeline=[]", "in a pipeline a key is"),
    ("+seed=4", "write `seed=value`"),
    ("seed=abc", r"`seed` \(override seed=abc\) is 'abc'"),
    ("first.stage.training.stepz=5", r"`first\.stage\.training\.stepz`"),
    ("first.stage.training.global_batch_size=5", r"`first\.stage\.training\.global_batch_size` \(5\)"),
    ("first.hydra.verbose=1", "would be ignored"),
    ("engine=nope", "`prepare.engine=nope`"),
]


@pytest.mark.parametrize(("override", "sentence"), PIPELINE, ids=[row[0] for row in PIPELINE])
def test_mistakes_in_a_pipelines_overrides(folder, override, sentence):
    with pytest.raises(UserError, match=sentence):
        load_recipe("pipeline.yaml", [override])


def test_files_that_cannot_be_read(folder):
    (folder / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.yaml is not UTF-8 text \(byte 9\)"):
        load_recipe("latin.yaml")
    for name in ("absent.yaml", "."):
        with pytest.raises(MissingInputError, match=rf"`{re.escape(name)}` is not a recipe file"):
            load_recipe(name)
    shutil.copy("toy.yaml", "toy.yml")
    with pytest.raises(UserError, match=r"must be named \*\.yaml"):
        load_recipe("toy.yml")
    shutil.copy("toy.yaml", "to y.yaml")
    with pytest.raises(UserError, match="rename it"):
        load_recipe("to y.yaml")


def test_shipped_recipes_are_found_from_anywhere(folder):
    for given in ("recipes/quickstart/pipeline.yaml", "quickstart/pipeline.yaml"):
        assert find_recipe(given) == package_folder("recipes") / "quickstart" / "pipeline.yaml"
    with pytest.raises(MissingInputError, match=r"did you mean 'recipes/quickstart/pipeline\.yaml'"):
        find_recipe("recipes/quickstart/pipelin.yaml")
    (folder / "recipes" / "quickstart").mkdir(parents=True)
    shutil.copy("toy.yaml", "recipes/quickstart/pipeline.yaml")
    assert find_recipe("recipes/quickstart/pipeline.yaml").is_relative_to(folder)  # the user's own comes first


def test_an_installed_package_composes_without_the_checkout(tmp_path):
    """The layout that hatch's force-include gives a wheel: recipes/ and configs/ inside the package."""
    root = Path(module.__file__).parents[2]
    shutil.copytree(root / "nanotrain" / "config", tmp_path / "nanotrain" / "config")
    (tmp_path / "nanotrain" / "__init__.py").touch()
    for name in ("recipes", "configs"):
        shutil.copytree(root / name, tmp_path / "nanotrain" / name)
    code = (
        "import nanotrain.config.load as m; r = m.load_recipe('recipes/quickstart/pipeline.yaml');"
        "print(m.__file__, r.file, len(r.entries))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded, recipe, count = done.stdout.split()
    assert Path(loaded).is_relative_to(tmp_path) and Path(recipe).is_relative_to(tmp_path) and int(count) >= 7


def test_every_stage_has_a_group_choice_and_a_kind_of_product():
    subclasses = set(StageConfig.__subclasses__())
    assert set(STAGE_CONFIGS.values()) == set(PRODUCT_KINDS) == subclasses
    assert all(dataclasses.is_dataclass(cls) for cls in subclasses)


def test_sweeps_are_expanded_with_hydras_parser():
    jobs = expand_sweeps(["a.steps=1,2", "seed=range(0,2)", "b.steps='x,y'", "c=[1,2]"])
    assert [job.overrides for job in jobs] == [
        ["a.steps=1", "seed=0", "b.steps='x,y'", "c=[1,2]"],
        ["a.steps=1", "seed=1", "b.steps='x,y'", "c=[1,2]"],
        ["a.steps=2", "seed=0", "b.steps='x,y'", "c=[1,2]"],
        ["a.steps=2", "seed=1", "b.steps='x,y'", "c=[1,2]"],
    ]
    assert [job.suffix for job in jobs] == [
        "-steps-1-seed-0",
        "-steps-1-seed-1",
        "-steps-2-seed-0",
        "-steps-2-seed-1",
    ]
    choices = expand_sweeps(["engine=choice(torch,torch_cpu)"])
    assert [job.overrides for job in choices] == [["engine=torch"], ["engine=torch_cpu"]]
    with pytest.raises(UserError, match="needs an override that sweeps"):
        expand_sweeps(["seed=1"])
    with pytest.raises(UserError, match="cannot be read"):
        expand_sweeps(["seed=1,"])
