import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.data.permutation import derive_key, permuted_index


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_every_item_comes_once(size, key):
    assert sorted(permuted_index(i, size, key) for i in range(size)) == list(range(size))


def test_keys_give_different_orders_and_neighbours_are_scattered():
    orders = [tuple(permuted_index(i, 1000, derive_key("k", seed)) for i in range(1000)) for seed in range(5)]
    assert len(set(orders)) == 5
    for order in orders:
        assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 20  # about 2 expected
        fixed = sum(position == item for position, item in enumerate(order))
        assert fixed < 10  # about 1 expected


def test_positions_are_uniform():
    counts = [0] * 10
    for key in range(2000):
        counts[permuted_index(3, 10, derive_key(key))] += 1
    chi_squared = sum((count - 200) ** 2 / 200 for count in counts)
    assert chi_squared < 33  # 9 degrees of freedom, p = 1e-4


def test_huge_sizes_cost_nothing():
    seen = {permuted_index(i, 10**13, 5) for i in range(200)}
    assert len(seen) == 200 and max(seen) < 10**13 and max(seen) > 10**11


def test_keys_depend_on_order_type_and_borders():
    keys = [
        derive_key("a", "b"),
        derive_key("b", "a"),
        derive_key("ab"),
        derive_key(1),
        derive_key("1"),
        derive_key("a", 1),
    ]
    assert len(set(keys)) == len(keys)


def test_outside_positions_are_our_own_mistake():
    with pytest.raises(AssertionError):
        permuted_index(5, 5, 0)
