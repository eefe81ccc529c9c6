import pytest

from nanotrain.config.blend import Blend, BlendSourceConfig, Curriculum, PoolConfig, WeightOrigin
from nanotrain.config.data import PhaseConfig
from nanotrain.config.errors import UserError
from nanotrain.planning.repetition import check_epochs, curriculum_caps, plan_repetition


def blend(weights, caps=None):
    caps = caps or {}
    sources = {n: BlendSourceConfig(w, caps.get(n, 0.0), WeightOrigin.chosen) for n, w in weights.items()}
    return Blend(weights, sources)


def test_tokens_and_epochs_by_hand():
    phases = [(0.6, blend({"a": 0.5, "b": 0.5}, {"a": 3.0})), (1.0, blend({"a": 0.25, "c": 0.75}, {"a": 2.0}))]
    pools = {"ab": PoolConfig(400, "made up", ["a", "b"]), "c": PoolConfig(100, "made up", ["c"])}
    a, b, c = plan_repetition(Curriculum(1000, phases, pools))
    assert (a.tokens, b.tokens, c.tokens) == (pytest.approx(400), pytest.approx(300), pytest.approx(300))
    assert a.epochs == b.epochs == pytest.approx(700 / 400) and c.epochs == pytest.approx(3.0)
    assert a.shares == (0.5, 0.25) and c.shares == (0.0, 0.75) and a.max_epochs == 2.0
    assert plan_repetition(Curriculum(1000, phases, pools), 2000)[2].epochs == pytest.approx(6.0)


def test_caps_are_the_lowest_of_all_phases_and_all_offenders_are_named():
    caps = curriculum_caps([PhaseConfig(0.5, {}, "", {"a": 3.0, "b": 1.0}), PhaseConfig(1.0, {}, "", {"a": 2.0})])
    assert caps == {"a": 2.0, "b": 1.0}
    check_epochs({"a": 2.0, "b": 1.0, "c": 99.0}, caps, "x", "y")
    with pytest.raises(
        UserError, match=r"x would repeat `a` 2.50 times, its cap is 2; `b` 1.10 times, its cap is 1; y"
    ):
        check_epochs({"a": 2.5, "b": 1.1}, caps, "x", "y")
