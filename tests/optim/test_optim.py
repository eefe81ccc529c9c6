"""Schedules against hand-computed values; weight-decay groups against the names of a real model."""

import math

import pytest

from nanotrain.config.training import DecayShape, OptimizerConfig, ScheduleConfig, ScheduleKind, TrainingConfig
from nanotrain.model.hybrid import HybridModel
from nanotrain.optim.adamw import build_adamw
from nanotrain.optim.lr_schedule import learning_rate


def training(**schedule) -> TrainingConfig:
    return TrainingConfig(
        steps=10,
        global_batch_size=1,
        micro_batch_size=1,
        sequence_length=2,
        learning_rate=1.0,
        schedule=ScheduleConfig(**schedule),
    )


def rates(config: TrainingConfig) -> list[float]:
    return [learning_rate(step, config) for step in range(config.steps)]


def test_wsd_warms_up_holds_and_ends_at_the_minimum():
    config = training(warmup_steps=2, decay_steps=4, decay_shape=DecayShape.linear, min_learning_rate=0.1)
    assert rates(config) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1])


@pytest.mark.parametrize(
    ("shape", "middle"),
    [(DecayShape.linear, 0.5), (DecayShape.cosine, 0.5), (DecayShape.minus_sqrt, 1 - math.sqrt(0.5))],
)
def test_decay_shapes_half_way(shape, middle):
    values = rates(training(decay_steps=4, decay_shape=shape))
    assert values[7] == pytest.approx(middle)
    assert values[9] == pytest.approx(0)
    assert values[5] == 1


def test_constant_and_cosine():
    assert rates(training(kind=ScheduleKind.constant, warmup_steps=1)) == [1.0] * 10
    values = rates(training(kind=ScheduleKind.cosine, warmup_steps=2, min_learning_rate=0.2))
    assert values[:2] == [0.5, 1.0]
    assert values[-1] == pytest.approx(0.2)
    assert values[5] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 4 / 8)))
    assert values == sorted(values[:2]) + sorted(values[2:], reverse=True)


def test_weight_decay_groups(tiny_training_model: HybridModel):
    optimizer = build_adamw(tiny_training_model.named_parameters(), OptimizerConfig(weight_decay=0.1), 1e-3)
    decayed, undecayed = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for name, parameter in tiny_training_model.named_parameters():
        last = name.split(".")[-1]
        plain = last in ("A_log", "D", "dt_bias", "bias") or "norm" in name
        assert (id(parameter) in undecayed) == plain, name
        assert (id(parameter) in decayed) != plain, name
