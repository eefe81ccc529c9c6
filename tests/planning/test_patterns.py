import pytest

from nanotrain.planning.patterns import count_layers, layers_of_kind, without_layers


def test_counts_and_indices_of_the_published_strings(published):
    assert count_layers(published("12b").hybrid_layer_pattern) == (28, 6, 28)
    assert count_layers(published("9b").hybrid_layer_pattern) == (27, 4, 25)
    assert layers_of_kind(published("12b").hybrid_layer_pattern, "*") == [7, 16, 25, 34, 43, 52]
    assert layers_of_kind(published("9b").hybrid_layer_pattern, "*") == [14, 21, 30, 39]


@pytest.mark.parametrize("mlp, mamba", [(17, 18), (19, 18), (19, 20), (21, 20), (21, 22), (23, 22), (23, 24)])
def test_the_seven_deletions_that_give_the_9b(published, mlp, mamba):
    removed = {7, 8, mlp, mamba, 48, 52}
    assert without_layers(published("12b").hybrid_layer_pattern, removed) == published("9b").hybrid_layer_pattern


def test_removing_nothing_and_all_but_one():
    assert without_layers("M-*", []) == "M-*"
    assert without_layers("M-*", [0, 1]) == "*"


def test_an_index_outside_is_our_defect():
    with pytest.raises(AssertionError):
        without_layers("M-*", [3])
