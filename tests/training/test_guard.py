import pytest

from nanotrain.training.guard import SkippedStepsGuard, TrainingDiverged


def test_only_a_row_of_skipped_steps_ends_the_run():
    guard = SkippedStepsGuard(3)
    for step, skipped in enumerate([True, True, False, True, True, False]):
        guard.observe(step, skipped, float("nan") if skipped else 1.0, 1.0)
    assert (guard.total, guard.in_a_row) == (4, 0)
    guard.observe(7, True, float("inf"), 1.0)
    guard.observe(8, True, 1.0, float("nan"))
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row up to step 9 .*max_nonfinite_steps` \(3\)"):
        guard.observe(9, True, 1.0, float("nan"))


def test_the_count_goes_on_after_a_resume():
    guard = SkippedStepsGuard(2, total=5, in_a_row=1)
    with pytest.raises(TrainingDiverged):
        guard.observe(1, True, float("nan"), 1.0)
    assert guard.total == 6
