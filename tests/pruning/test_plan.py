import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.pruning.plan import PruningPlan


def small(config) -> PruningPlan:
    return PruningPlan(
        layers=(0, 1, 2, 5),
        hidden=(0, 3, 11),
        ffn={1: (0, 19)},
        mamba_heads={0: (0, 3, 4), 5: (1, 2, 5)},
    )


def test_pruned_config(tiny_config):
    config = tiny_config()
    plan = small(config)
    plan.validate(config)
    expected = tiny_config(hybrid_layer_pattern="M-*M", hidden_size=3, intermediate_size=2, mamba_num_heads=3)
    assert plan.pruned_config(config) == expected


def test_identity_keeps_the_config(tiny_config):
    config = tiny_config()
    plan = PruningPlan.identity(config)
    plan.validate(config)
    assert plan.pruned_config(config) == config


def test_a_size_without_layers_stays_the_parents(tiny_config):
    plan = PruningPlan(layers=(2,), hidden=(0, 1), ffn={}, mamba_heads={})
    plan.validate(tiny_config())
    assert plan.pruned_config(tiny_config()) == tiny_config(hybrid_layer_pattern="*", hidden_size=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": ()}, "`layers` of plan is empty"),
        ({"layers": (0, 1, 2, 6)}, "holds 6, outside 0..5"),
        ({"layers": (0, 2, 1, 5)}, "`layers` of plan holds 1 after 2"),
        ({"hidden": (0, 12)}, r"holds 12, outside 0..11 of the parent \(`hidden_size` 12\)"),
        ({"hidden": (-1, 2)}, "holds -1"),
        ({"hidden": (3, 3)}, "indices must rise"),
        ({"hidden": ()}, "`hidden` of plan is empty"),
        ({"ffn": {}}, r"`ffn` of plan names the layers \[\] but the kept '-' layers are \[1\]"),
        ({"ffn": {1: (0,), 4: (0,)}}, r"names the layers \[1, 4\]"),
        ({"ffn": {1: (20,)}}, r"`ffn.1` of plan holds 20"),
        ({"mamba_heads": {0: (0, 3, 4)}}, r"`mamba_heads` of plan names the layers \[0\]"),
        ({"mamba_heads": {0: (0, 3, 4), 5: tuple(range(6))}}, "every layer must keep the same number"),
        ({"mamba_heads": {0: (0, 1, 4), 5: (1, 2, 5)}}, r"`mamba_heads.0` of plan keeps \[2, 0, 1\] heads"),
        ({"mamba_heads": {0: (0, 3, 4), 5: (1, 2, 6)}}, "holds 6, outside 0..5"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tiny_config, change, message):
    config = tiny_config()
    with pytest.raises(UserError, match=message):
        dataclasses.replace(small(config), **change).validate(config)


indices = st.lists(st.integers(0, 10**6), max_size=5).map(tuple)
per_layer = st.dictionaries(st.integers(0, 100), indices, max_size=4)


@given(st.builds(PruningPlan, layers=indices, hidden=indices, ffn=per_layer, mamba_heads=per_layer))
def test_json_round_trip(plan):
    assert PruningPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_file_round_trip(tiny_config, tmp_path):
    plan = small(tiny_config())
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"plan\.json does not exist"):
        PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"layer": []}', "unknown key 'layer'; did you mean 'layers'"),
        ('{"layers": []}', "has no key 'hidden'"),
        ('{"layers": [1.5], "hidden": [], "ffn": {}, "mamba_heads": {}}', "`layers` of .* must be a list of whole"),
        ('{"layers": [true], "hidden": [], "ffn": {}, "mamba_heads": {}}', "must be a list of whole numbers"),
        ('{"layers": [], "hidden": [], "ffn": [], "mamba_heads": {}}', "`ffn` of .* must be an object"),
        ('{"layers": [], "hidden": [], "ffn": {"a": []}, "mamba_heads": {}}', "`ffn` of .* must be an object"),
        ('{"layers": [], "hidden": [], "ffn": {"1": 2}, "mamba_heads": {}}', "`ffn` of .*, layer 1, must be a list"),
    ],
)
def test_a_file_that_holds_no_plan_is_refused(tmp_path, text, message):
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        PruningPlan.load(file)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not valid JSON"):
        PruningPlan.load(tmp_path / "plan.json")
