import pytest

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.config.shipped import package_folder
from nanotrain.config.sources import COMPONENTS_FOLDER, RecordForm, load_component

NAMES = sorted(file.stem for file in (package_folder("configs") / COMPONENTS_FOLDER).glob("*.yaml"))
RELEASED = {
    "nvidia/Nemotron-CC-v2": 6,
    "nvidia/Nemotron-CC-Math-v1": 3,
    "nvidia/Nemotron-Pretraining-Code-v1": 2,
    "nvidia/Nemotron-Pretraining-SFT-v1": 3,
    "nvidia/Nemotron-Pretraining-Dataset-sample": 10,
    "nvidia/Nemotron-Pretraining-Long-Context-v1": 1,
    "nvidia/Nemotron-Post-Training-Dataset-v1": 5,
    "nvidia/Nemotron-Post-Training-Dataset-v2": 9,
}
"""Configurations, or splits, that the data cards list."""


def test_every_released_set_has_all_its_configurations():
    components = {name: load_component(name) for name in NAMES}
    assert {one.hub_id: len(one.subsets) for one in components.values()} == RELEASED
    keys = [key for one in components.values() for key in one.subsets]
    assert len(keys) == len(set(keys))
    v1 = components["nemotron_post_training_dataset_v1"]
    assert sum(subset.published_rows for subset in v1.subsets.values()) == 25_659_642
    v2 = components["nemotron_post_training_dataset_v2"]
    assert sum(subset.published_rows for subset in v2.subsets.values()) == 6_341_414
    pairs = [(s.hub_config, s.split) for s in v2.subsets.values()]
    assert len(set(pairs)) == 9


def test_released_tokens_are_those_of_the_card():
    """6,585.8 billion tokens in all, besides the code that is only named."""
    total = sum(
        subset.published_tokens
        for name in (
            "nemotron_cc_v2",
            "nemotron_cc_math_v1",
            "nemotron_pretraining_code_v1",
            "nemotron_pretraining_sft_v1",
        )
        for subset in load_component(name).subsets.values()
        if subset.form is RecordForm.text
    )
    english_cc, rounding = 3359.8e9, 0.5e9
    assert abs(total + english_cc - 6585.8e9) < rounding


BASE = "hub_id: a/b\nlicence: MIT\ngated: false\nsubsets:\n  one:\n    columns: {text: string}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE.replace("gated", "gatet"), r"`gatet` .* is not a key of ComponentConfig; did you mean 'gated'"),
        (BASE.replace("licence: MIT\n", ""), r"`licence` has no value"),
        (BASE.replace("string", "text"), r"`subsets.one.columns.text` \(text\) is not a type"),
        (BASE.replace("{text", "{content"), r"`subsets.one.columns` lacks `text`"),
        (BASE + "    form: code_reference\n", r"`subsets.one.columns` lacks `repo`"),
        (BASE + "    form: txt\n", r"form.* must be one of text, messages, code_reference; did you mean 'text'"),
        (BASE + "    published_rows: 7\n", r"`subsets.one.origin` must say where"),
        (BASE + "    published_rows: many\n", r"published_rows.* must be a whole number"),
        (BASE + "    licence_column: license\n", r"lacks `license`"),
    ],
)
def test_a_mistake_is_named_with_its_key(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_component(file)


def test_an_unknown_component_is_told_the_nearest_name():
    with pytest.raises(MissingInputError, match="did you mean 'nemotron_cc_v2'"):
        load_component("nemotron_cc_v3")
