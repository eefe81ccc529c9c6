import math

from hypothesis import given
from hypothesis import strategies as st

from nanotrain.report.axes import Scale, format_tick, nice_ticks, padded_range

FINITE = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e9))
def test_ticks_are_round_rising_and_inside(low: float, span: float) -> None:
    high = low + span
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else None
    assert len(ticks) <= 12
    assert all(low - span * 1e-6 <= tick <= high + span * 1e-6 for tick in ticks)
    if step is not None:
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-3


def test_known_ticks() -> None:
    assert nice_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(3, 3) == [3]
    assert [round(tick, 10) for tick in nice_ticks(0.11, 0.42)] == [0.2, 0.3, 0.4]


def test_tick_texts() -> None:
    texts = {0.0: "0", 0.02: "0.02", 400.0: "400", 12000.0: "12k", 3e6: "3M", 2.5e9: "2.5B", 1e-5: "1e-05"}
    assert {value: format_tick(value) for value in texts} == texts


def test_scale_maps_ends_and_centres_a_constant() -> None:
    scale = Scale(2, 4, 100, 0)
    assert (scale(2), scale(3), scale(4)) == (100, 50, 0)
    assert Scale(5, 5, 0, 10)(5) == 5


@given(st.lists(FINITE, min_size=1, max_size=5))
def test_padded_range_holds_all_values(values: list[float]) -> None:
    low, high = padded_range(values)
    assert low < high or max(map(abs, values)) > 1e8
    assert low <= min(values) and max(values) <= high
    assert padded_range([1.0, 3.0], from_zero=True)[0] == 0
