"""Against the grid written out by hand."""

import dataclasses
import itertools
import math

import pytest

from nanotrain.config.errors import UserError
from nanotrain.config.stage import PruneSearchConfig
from nanotrain.planning.memory import inference_memory_bytes
from nanotrain.planning.parameters import count_parameters
from nanotrain.pruning.search import choose, enumerate_candidates, shortlist, validate_widths

PATTERNS = {6: "M-*M-M", 4: "-*MM"}


def sizes(one):
    return (one.num_layers, one.hidden_size, one.intermediate_size, one.mamba_num_heads)


def test_the_whole_grid(tiny_config):
    parent = tiny_config()
    search = PruneSearchConfig(
        hidden_size=[8, 12, 8], intermediate_size=[10, 15], mamba_num_heads=[3, 6], max_parameters_fraction=0.8
    )
    found = enumerate_candidates(search, parent, PATTERNS)
    grid = set(itertools.product([6, 4], [8, 12], [10, 15], [3, 6]))
    assert {sizes(one) for one in found} == grid and len(found) == len(grid)
    for one in found:
        config = dataclasses.replace(
            parent,
            hybrid_layer_pattern=PATTERNS[one.num_layers],
            hidden_size=one.hidden_size,
            intermediate_size=one.intermediate_size,
            mamba_num_heads=one.mamba_num_heads,
        )
        assert one.parameters == count_parameters(config)
        assert one.memory_bytes == inference_memory_bytes(config, 131072, 1)
        assert one.fits == (one.parameters <= 0.8 * count_parameters(parent))
    assert [one.parameters for one in found] == sorted((one.parameters for one in found), reverse=True)
    fitting = [one for one in found if one.fits]
    assert 0 < len(fitting) < len(found)
    assert shortlist(found, search, parent) == fitting[:3]


def test_an_empty_axis_keeps_the_parents_size(tiny_config):
    parent = tiny_config()
    (only,) = enumerate_candidates(PruneSearchConfig(), parent, {6: "M-*M-M"})
    assert sizes(only) == (6, 12, 20, 6) and only.parameters == count_parameters(parent) and only.fits


def test_an_axis_that_no_kept_layer_uses_is_not_multiplied(tiny_config):
    search = PruneSearchConfig(intermediate_size=[10, 15], mamba_num_heads=[3, 6])
    found = enumerate_candidates(search, tiny_config(), {2: "-*"})
    assert {sizes(one) for one in found} == {(2, 12, 10, 6), (2, 12, 15, 6)}


def test_memory_budget_orders_by_memory(tiny_config):
    parent = tiny_config()
    one_attention_more = {4: "-*-M", 5: "M-M-M"}
    search = PruneSearchConfig(max_memory_bytes=10**9, context_length=10**5, hidden_size=[8, 12])
    found = enumerate_candidates(search, parent, one_attention_more)
    assert [one.memory_bytes for one in found] == sorted((one.memory_bytes for one in found), reverse=True)
    by_parameters = sorted(found, key=lambda one: -one.parameters)
    assert [sizes(one) for one in by_parameters] != [sizes(one) for one in found]
    budget = sorted(one.memory_bytes for one in found)[1]
    tight = enumerate_candidates(dataclasses.replace(search, max_memory_bytes=budget), parent, one_attention_more)
    assert sorted(one.memory_bytes for one in tight if one.fits) == sorted(one.memory_bytes for one in found)[:2]


def test_the_published_choice_is_among_the_largest_within_the_published_budget(published):
    search = PruneSearchConfig(
        hidden_size=[4480, 4800],
        intermediate_size=[14400, 15680, 17920],
        mamba_num_heads=[112, 120, 128],
        max_memory_bytes=int(19.66 * 2**30),
    )
    pattern = published("9b").hybrid_layer_pattern
    found = enumerate_candidates(search, published("12b"), {56: pattern})
    table = {(56, 4480, 17920, 112), (56, 4480, 15680, 128), (56, 4800, 14400, 120)}
    assert table <= {sizes(one) for one in found if one.fits}
    assert {one.parameters for one in found if sizes(one) in table} == {8_923_356_912, 8_888_227_328, 8_965_788_600}


def test_nothing_fits(tiny_config):
    parent = tiny_config()
    search = PruneSearchConfig(hidden_size=[10, 8], max_parameters_fraction=0.01, max_memory_bytes=1)
    found = enumerate_candidates(search, parent, PATTERNS)
    smallest = min(one.parameters for one in found)
    with pytest.raises(UserError) as error:
        shortlist(found, search, parent)
    message = str(error.value)
    assert f"(4 layers, hidden 8, intermediate 20, 6 Mamba heads) has {smallest:,} parameters" in message
    assert "`max_parameters_fraction` (0.01" in message and "`max_memory_bytes` (1)" in message


@pytest.mark.parametrize(
    "search, changes, message",
    [
        ({"hidden_size": [13]}, {}, r"`stage.search.hidden_size` \(13\) exceeds the parent's 12"),
        ({"intermediate_size": [4, 21]}, {}, r"`stage.search.intermediate_size` \(21\) exceeds"),
        ({"mamba_num_heads": [7]}, {}, r"exceeds the parent's 6"),
        ({"mamba_num_heads": [4]}, {}, r"\(4\) must be divisible by the parent's `n_groups` \(3\).*use 3 or 6"),
        ({"mamba_num_heads": [2]}, {}, r"use 3\."),
        ({"mamba_num_heads": [3]}, {"hybrid_layer_pattern": "-*"}, "would do nothing: the parent .* has no 'M' layer"),
        ({"intermediate_size": [3]}, {"hybrid_layer_pattern": "M*"}, "has no '-' layer"),
    ],
)
def test_widths_that_the_parent_cannot_give(tiny_config, search, changes, message):
    with pytest.raises(UserError, match=message):
        validate_widths(PruneSearchConfig(**search), tiny_config(**changes))


def test_widths_that_the_parent_can_give(tiny_config):
    validate_widths(PruneSearchConfig(hidden_size=[1, 12], mamba_num_heads=[3, 6]), tiny_config())
    validate_widths(PruneSearchConfig(mamba_num_heads=[6]), tiny_config(hybrid_layer_pattern="-*"))


class TestChoose:
    def candidates(self, tiny_config):
        return enumerate_candidates(PruneSearchConfig(hidden_size=[8, 10, 12]), tiny_config(), {6: "M-*M-M"})

    def test_the_lowest_loss_wins(self, tiny_config):
        candidates = self.candidates(tiny_config)
        losses = {12: 3.0, 10: 2.0, 8: 2.5}
        best, scored = choose(candidates, lambda one: losses[one.hidden_size])
        assert best.hidden_size == 10
        report = [one.to_json(best) for one in scored]
        assert [(one["hidden_size"], one["held_out"], one["chosen"]) for one in report] == [
            (12, 3.0, False),
            (10, 2.0, True),
            (8, 2.5, False),
        ]

    def test_equal_losses_take_the_largest(self, tiny_config):
        assert choose(self.candidates(tiny_config), lambda one: 1.0)[0].hidden_size == 12

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_never_wins(self, tiny_config, bad):
        best, scored = choose(self.candidates(tiny_config), lambda one: bad if one.hidden_size > 8 else 9.0)
        assert best.hidden_size == 8
        assert [one.to_json(best)["held_out"] for one in scored] == [None, None, 9.0]
