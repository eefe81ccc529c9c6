"""Schedules against hand-computed values; weight-decay groups against the names of a real model."""

import math

import pytest
import torch

from nanotrain.config.errors import UserError
from nanotrain.config.training import (
    DecayShape,
    OptimizerConfig,
    ParameterDtype,
    ScheduleConfig,
    ScheduleKind,
    StateDtype,
    TrainingConfig,
)
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


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        ({"in_backward": True}, ["in_backward", "gradient_clip"]),
        ({"state_dtype": StateDtype.bf16, "beta2": 0.999}, ["state_dtype", "0.999"]),
    ],
)
def test_combinations_that_cannot_work_are_refused(optimizer, names):
    with pytest.raises(UserError) as error:
        OptimizerConfig(**optimizer).validate("stage.training.optimizer")
    assert all(name in str(error.value) for name in names)


def test_in_backward_refuses_accumulation():
    config = training()
    config.optimizer = OptimizerConfig(in_backward=True, gradient_clip=0.0)
    config.validate_batch("stage.training", 1)
    config.global_batch_size = 4
    with pytest.raises(UserError, match="cannot accumulate"):
        config.validate_batch("stage.training", 1)
    config.validate_batch("stage.training", 4)


def test_state_dict_keeps_dtypes(tiny_training_model: HybridModel, tmp_path):
    model = tiny_training_model.to(torch.bfloat16)
    config = OptimizerConfig(state_dtype=StateDtype.int8, parameter_dtype=ParameterDtype.bf16)
    one, other = (build_adamw(model.named_parameters(), config, 1e-3) for _ in range(2))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    one.step()
    torch.save(one.state_dict(), tmp_path / "optimizer.pt")
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    dtypes = set()
    for parameter in model.parameters():
        for name, tensor in one.state[parameter].items():
            assert tensor.equal(other.state[parameter][name]) and tensor.dtype == other.state[parameter][name].dtype
            dtypes.add(tensor.dtype)
    assert torch.float32 in dtypes
    assert [group["num_steps"] for group in other.param_groups] == [1, 1]
