import math
import statistics

import pytest

from nanotrain.config.errors import UserError
from nanotrain.config.training import OptimizerConfig, SpikeAction, SpikeConfig, TrainingConfig
from nanotrain.training.spike import SpikeDetector

LOSSES = [4.0, 4.2, 4.1, 3.8, 3.9, 3.7]


def test_the_limit_is_mean_plus_z_standard_deviations_of_the_window():
    detector = SpikeDetector(SpikeConfig(SpikeAction.skip, z_score=2.0, window=4))
    assert [detector.observe(loss) for loss in LOSSES] == [None] * 6
    window = LOSSES[-4:]
    limit = statistics.fmean(window) + 2 * statistics.pstdev(window)
    assert detector.max_loss == pytest.approx(limit)
    assert "standard deviations" in detector.observe(limit + 1e-6)
    assert detector.history == window  # a step that is left out does not move the window


def test_nothing_is_a_spike_before_the_window_is_half_full_or_when_it_is_off():
    detector = SpikeDetector(SpikeConfig(SpikeAction.log, z_score=2.0, window=8))
    assert [detector.observe(loss) for loss in (4.0, 4.1, 400.0)] == [None] * 3
    off = SpikeDetector(SpikeConfig())
    assert off.observe(1e9) is None and off.limit == math.inf and off.history == []


def test_the_window_is_what_is_saved():
    config = SpikeConfig(SpikeAction.log, z_score=2.0, window=4)
    whole = SpikeDetector(config)
    cut = SpikeDetector(config)
    for loss in LOSSES[:4]:
        whole.observe(loss), cut.observe(loss)
    resumed = SpikeDetector(config, cut.history)
    for loss in [*LOSSES[4:], 9.0, 9.0, 9.0]:
        assert resumed.observe(loss) == whole.observe(loss)
    assert resumed.observe(9.0) is None  # a lasting change is accepted


def test_what_cannot_work_is_refused():
    base = {"steps": 9, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 8, "learning_rate": 1.0}
    with pytest.raises(UserError, match=r"spike\.action` \(roll_back\).*keep_every"):
        TrainingConfig(**base, spike=SpikeConfig(SpikeAction.roll_back)).validate("t")
    optimizer = OptimizerConfig(in_backward=True, gradient_clip=0.0)
    with pytest.raises(UserError, match=r"spike\.action` \(skip\).*in_backward"):
        TrainingConfig(**base, optimizer=optimizer, spike=SpikeConfig(SpikeAction.skip)).validate("t")
    with pytest.raises(UserError, match=r"spike\.window` \(1\)"):
        TrainingConfig(**base, spike=SpikeConfig(window=1)).validate("t")
