import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanotrain.evaluation.intervals import wilson_interval


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)  # the last row: Newcombe, Statistics in Medicine 17 (1998), table I
def test_known_intervals(successes: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(successes / count, count) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_bounds_solve_the_score_equation(pair: tuple[int, int]) -> None:
    """(p - mean)^2 = z^2 p (1 - p) / n has the two bounds as its roots."""
    successes, count = pair
    mean, z = successes / count, 1.959963984540054
    roots = np.sort(np.roots([1 + z * z / count, -2 * mean - z * z / count, mean * mean]).real)
    assert wilson_interval(mean, count) == pytest.approx(tuple(roots), abs=1e-7)


@given(st.floats(0, 1), st.integers(1, 10_000))
def test_interval_holds_the_mean_and_stays_a_share(mean: float, count: int) -> None:
    low, high = wilson_interval(mean, count)
    assert 0 <= low <= mean <= high <= 1
    assert wilson_interval(mean, 2 * count)[1] - wilson_interval(mean, 2 * count)[0] < high - low
