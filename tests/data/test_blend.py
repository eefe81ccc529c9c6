import itertools
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.config.data import PhaseConfig
from nanotrain.data.blend import Blend, Curriculum, interleave

recipe_weights = (
    st.lists(st.integers(0, 100), min_size=1, max_size=12)
    .filter(sum)
    .map(lambda parts: {f"s{i}": part / 100 for i, part in enumerate(parts)})
)


@settings(max_examples=80, deadline=None)
@given(weights=recipe_weights, length=st.integers(1, 600))
def test_every_prefix_keeps_the_weights_to_less_than_one_sample(weights, length):
    blend = Blend(weights)
    total = sum(Fraction(repr(weight)) for weight in weights.values())
    drawn = Counter()
    for k in range(length):
        name, number = blend.draw(k)
        assert number == drawn[name]  # numbered in the order of drawing
        assert blend.counts(k) == {source: drawn[source] for source in blend.sources}
        drawn[name] += 1
        for source, weight in weights.items():
            assert abs(drawn[source] - Fraction(repr(weight)) / total * (k + 1)) < 1


@settings(max_examples=40, deadline=None)
@given(shares=st.lists(st.integers(0, 60), min_size=1, max_size=20).filter(sum))
def test_a_table_holds_each_source_as_often_as_its_share(shares):
    counts = Counter(interleave(shares))
    assert [counts[i] for i in range(len(shares))] == shares


def test_irrational_weights_stay_within_a_thousandth_of_a_percent():
    weights = {"a": 0.1234567890123, "b": 2 / 3, "c": 1e-5, "d": 0.0987654321}
    blend, total, window = Blend(weights), sum(weights.values()), 100_000
    for start in (0, 123_457):
        before, after = blend.counts(start), blend.counts(start + window)
        for name, weight in weights.items():
            share = (after[name] - before[name]) / window
            assert share == pytest.approx(weight / total, abs=3e-5)
    assert blend.counts(10**6)["c"] > 0


def test_sixty_sources_do_not_come_in_bursts():
    blend = Blend({"big": 0.9} | {f"s{i:02}": 0.1 / 59 for i in range(59)})
    names = [blend.draw(k)[0] for k in range(2000)]
    assert max(len(run) for run in "".join("b" if n == "big" else "s" for n in names).split("b")) <= 2


def test_zero_weights_are_never_drawn():
    blend = Blend({"a": 0.0, "b": 1.0})
    assert blend.sources == ["b"] and {blend.draw(k)[0] for k in range(10)} == {"b"}


def phases(*parts: tuple[float, dict[str, float]]) -> list[PhaseConfig]:
    return [PhaseConfig(until=until, weights=weights) for until, weights in parts]


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(recipe_weights, min_size=1, max_size=3), length=st.integers(1, 400))
def test_a_curriculum_numbers_each_source_without_gap_over_its_phases(weights, length):
    untils = [(i + 1) / len(weights) for i in range(len(weights))]
    curriculum = Curriculum(phases(*zip(untils, weights, strict=True)), length)
    drawn = Counter()
    for k in range(length):
        name, number = curriculum.draw(k)
        assert number == drawn[name]
        drawn[name] += 1
    assert {n: c for n, c in curriculum.totals.items() if c} == dict(drawn)


def test_switch_points_are_exact():
    curriculum = Curriculum(phases((0.6, {"a": 1}), (0.9, {"b": 1}), (1.0, {"c": 1})), 1000)
    assert [curriculum.draw(k)[0] for k in (0, 599, 600, 899, 900, 999)] == ["a", "a", "b", "b", "c", "c"]


def test_a_phase_too_short_for_a_sample_is_passed_over():
    curriculum = Curriculum(phases((0.001, {"a": 1}), (1.0, {"b": 1})), 10)
    assert curriculum.draw(0) == ("b", 0) and curriculum.totals == {"a": 0, "b": 10}


float_weights = st.lists(
    st.floats(0, 1e6, allow_nan=False, allow_subnormal=False) | st.floats(1e-9, 1), min_size=1, max_size=60
).filter(lambda weights: sum(weights) > 0)


@settings(max_examples=25, deadline=None)
@given(weights=float_weights, start=st.integers(0, 10**12))
def test_any_window_of_100_000_samples_keeps_the_weights_to_a_tenth_of_a_percent(weights, start):
    named = {f"s{i}": weight for i, weight in enumerate(weights)}
    blend, total = Blend(named), sum(weights)
    before, after = blend.counts(start), blend.counts(start + 100_000)
    assert sum(after.values()) - sum(before.values()) == 100_000
    for name in blend.sources:
        assert abs((after[name] - before[name]) / 100_000 - named[name] / total) < 1e-3


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.floats(0.001, 0.999), max_size=3, unique=True),
    num_samples=st.integers(1, 10**9),
)
def test_a_switch_falls_on_its_sample(cuts, num_samples):
    untils = [*sorted(cuts), 1.0]
    curriculum = Curriculum(phases(*((until, {f"p{i}": 1.0}) for i, until in enumerate(untils))), num_samples)
    ends = [round(until * num_samples) for until in untils]
    for i, (first, end) in enumerate(itertools.pairwise([0, *ends])):
        if first < end:
            assert curriculum.draw(first) == (f"p{i}", 0)
            assert curriculum.draw(end - 1) == (f"p{i}", end - first - 1)
    assert sum(curriculum.totals.values()) == num_samples
