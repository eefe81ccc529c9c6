import math
import shutil

import pytest
import yaml

from nanotrain.config.blend import WeightOrigin, load_blend, load_curriculum
from nanotrain.config.errors import UserError
from nanotrain.config.load import load_recipe
from nanotrain.config.shipped import package_folder
from nanotrain.config.sources import load_component
from nanotrain.planning.repetition import plan_repetition

BLENDS = package_folder("configs") / "data" / "blends"
CURRICULA = sorted(BLENDS.rglob("curriculum.yaml"))
THIRTEEN = [
    "crawl_medium",
    "crawl_medium_high",
    "crawl_high",
    "crawl_synthetic",
    "math",
    "wikipedia",
    "code",
    "academic",
    "crawl_plus_plus",
    "multilingual",
    "general_sft",
    "stem_sft",
    "code_sft",
]


@pytest.mark.parametrize("file", CURRICULA, ids=lambda file: file.parent.name)
def test_shipped_curricula_load_and_their_shares_sum_to_one(file):
    curriculum = load_curriculum(file)
    for _, blend in curriculum.phases:
        assert math.isclose(sum(blend.weights.values()), 1.0, abs_tol=1e-9)
    for one in plan_repetition(curriculum):
        assert not one.max_epochs or one.epochs <= one.max_epochs
    drawn = sum(one.tokens for one in plan_repetition(curriculum))
    assert math.isclose(drawn, curriculum.total_tokens, rel_tol=1e-9)


def test_the_published_run_has_thirteen_categories_and_no_weight_that_claims_to_be_published():
    curriculum = load_curriculum("nemotron_nano_v2/curriculum")
    assert [until for until, _ in curriculum.phases] == [0.6, 0.9, 1.0] and curriculum.total_tokens == 20 * 10**12
    for _, blend in curriculum.phases:
        assert list(blend.weights) == THIRTEEN
        assert {source.origin for source in blend.sources.values()} == {WeightOrigin.chosen}
    pools = sum(pool.tokens for pool in curriculum.pools.values())
    assert pools == 10_648_823_153_919  # the model card's total


def test_proxies_are_called_proxies():
    names = [f"proxy_nemotron_3_{size}/phase_{phase}" for size in ("nano", "super") for phase in (1, 2)]
    for blend in map(load_blend, names):
        assert {source.origin for source in blend.sources.values()} == {WeightOrigin.proxy}


def test_pools_and_released_blends_name_released_subsets():
    known = set()
    for file in (package_folder("configs") / "data/nemotron_pretraining_v1").glob("*.yaml"):
        known |= set(load_component(file).subsets)
    for file in CURRICULA:
        for pool in load_curriculum(file).pools.values():
            assert set(pool.subsets) <= known
    for phase in "123":
        assert set(load_blend(f"released_v1/phase_{phase}").weights) <= known


def test_the_long_context_blend_is_four_fifths_of_phase_3():
    phase_3, blend = load_blend("nemotron_nano_v2/phase_3"), load_blend("nemotron_nano_v2/long_context")
    assert blend.weights["long_document_qa"] == pytest.approx(0.2)
    for name, weight in phase_3.weights.items():
        assert blend.weights[name] == pytest.approx(0.8 * weight)
    assert blend.max_epochs == phase_3.max_epochs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: {a: {weight: .nan, origin: chosen}}", r"`sources.a.weight` \(nan\)"),
        ("sources: {a: {weight: -1, origin: chosen}}", r"`sources.a.weight` \(-1.0\)"),
        ("sources: {a: {weight: 0, origin: chosen}}", "at least one weight above 0"),
        ("sources: {a: {weight: 1}}", r"`sources.a.origin` has no value"),
        ("sources: {a: {weight: 1, origin: guessed}}", "must be one of published, proxy, chosen"),
        ("base: b\nbase_share: 0.5\nsources: {a: {weight: 1, origin: chosen}}", "leads back to the blend itself"),
        ("base: b\nsources: {a: {weight: 1, origin: chosen}}", "`base` and `base_share`"),
        ("base: c\nbase_share: 0.5\nsources: {a: {weight: 1, origin: chosen}}", "is a source of its base already"),
        ("sources: {a: {weight: 1, origin: chosen, cap: 3}}", r"is not a key of BlendSourceConfig"),
    ],
)
def test_a_mistake_in_a_blend_is_named(tmp_path, text, message):
    (tmp_path / "b.yaml").write_text(text)
    (tmp_path / "c.yaml").write_text("sources: {a: {weight: 1, origin: chosen}}")
    with pytest.raises(UserError, match=message):
        load_blend(tmp_path / "b.yaml")


def write_recipe(folder, curriculum, **stage):
    content = {
        "defaults": ["recipe", {"/stage": "pretrain"}, {"/model@stage.model": "quickstart"}, "_self_"],
        "name": "x",
        "stage": {"data_from": "./data", "curriculum": curriculum, **stage},
    }
    training = {"steps": 4, "global_batch_size": 2, "micro_batch_size": 2, "sequence_length": 8, "learning_rate": 0.001}
    content["stage"]["training"] = training
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return folder / "mine.yaml"


def test_a_recipe_takes_weights_and_caps_from_a_blend_beside_it(tmp_path):
    (tmp_path / "b.yaml").write_text(
        "sources: {a: {weight: 3, max_epochs: 4, origin: chosen}, c: {weight: 1, origin: chosen}}"
    )
    phases = [{"until": 0.5, "blend": "b.yaml"}, {"until": 1.0, "blend": "nemotron_nano_v2/phase_3"}]
    entry = load_recipe(write_recipe(tmp_path, phases)).entries[0]
    first, second = entry.config.stage.curriculum
    assert first.weights == {"a": 0.75, "c": 0.25} and first.max_epochs == {"a": 4.0}
    assert list(second.weights) == THIRTEEN
    assert entry.resolved["stage"]["curriculum"][0]["weights"] == {"a": 0.75, "c": 0.25}  # so the fingerprint sees it
    shutil.copy(tmp_path / "b.yaml", tmp_path / "old.yaml")
    (tmp_path / "b.yaml").write_text("sources: {a: {weight: 1, origin: chosen}}")
    assert load_recipe(tmp_path / "mine.yaml").entries[0].resolved != entry.resolved


def test_a_phase_has_a_blend_or_weights_and_a_cap_needs_its_source(tmp_path):
    phases = [{"until": 1.0, "blend": "nemotron_nano_v2/phase_3", "weights": {"a": 1.0}}]
    with pytest.raises(UserError, match=r"`stage.curriculum\[0\]` .* has both `blend` and `weights`"):
        load_recipe(write_recipe(tmp_path, phases))
    phases = [{"until": 1.0, "weights": {"a": 1.0}, "max_epochs": {"b": 2.0}}]
    with pytest.raises(UserError, match=r"max_epochs.b` caps what is no source"):
        load_recipe(write_recipe(tmp_path, phases))


def test_names_are_free_only_where_a_folder_is_named(tmp_path):
    phases = [{"until": 1.0, "weights": {"crawl": 1.0}}]
    assert load_recipe(write_recipe(tmp_path, phases)).entries
    with pytest.raises(UserError, match=r"`stage.curriculum\[0\].weights.crawl` is not a source"):
        load_recipe(write_recipe(tmp_path, phases, data_from="prepare"))
