from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.data.packing import best_fit


def best_fit_ref(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing, by looking through all bins."""
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        rooms = [(capacity - sum(lengths[r] for r in b), i) for i, b in enumerate(bins)]
        fitting = [pair for pair in rooms if pair[0] >= lengths[row]]
        if fitting:
            bins[min(fitting)[1]].append(row)
        else:
            bins.append([row])
    return bins


@settings(max_examples=150, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 60))
def test_equals_the_exhaustive_search(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=40))
    assert best_fit(lengths, capacity) == best_fit_ref(lengths, capacity)


def test_reasoning_rows_pack_tightly():
    lengths = [40 + (i * 37) % 160 for i in range(2000)]
    bins = best_fit(lengths, 256)
    assert sum(lengths) / (len(bins) * 256) > 0.97
    assert sorted(row for b in bins for row in b) == list(range(2000))
