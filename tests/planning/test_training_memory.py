"""The plan's bytes against the published arithmetic and against peaks measured on one H200."""

from dataclasses import replace

import pytest

from nanotrain.config.engine import ActivationCheckpointingConfig, EngineConfig, Precision
from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype, TrainingConfig
from nanotrain.planning.training_memory import smaller_configurations, training_memory

GIB = 2**30
BF16 = {"parameter_dtype": ParameterDtype.bf16}
ALL = ActivationCheckpointingConfig(mamba=True, mlp=True, attention=True)


def training(rows=1, total=None, **optimizer) -> TrainingConfig:
    return TrainingConfig(
        steps=1, global_batch_size=total or rows, micro_batch_size=rows, sequence_length=8192, learning_rate=1e-4,
        optimizer=OptimizerConfig(**optimizer),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_parameter"),
    [
        ({}, 16),
        (BF16 | {"state_dtype": StateDtype.bf16}, 8),
        (BF16 | {"state_dtype": StateDtype.int8}, 6.03),
    ],
)
def test_state_of_the_published_12b(published, optimizer, bytes_a_parameter):
    plan = training_memory(published("12b"), training(**optimizer), EngineConfig(precision=Precision.bf16))
    state = plan.weights + plan.gradients + plan.optimizer_states
    assert state / 12_310_001_152 == pytest.approx(bytes_a_parameter, abs=0.01)


IN_BACKWARD = {"in_backward": True, "gradient_clip": 0.0}
MLP = ActivationCheckpointingConfig(mlp=True)
NOTHING = ActivationCheckpointingConfig()
MEASURED = [  # docs/benchmarks/memory_h200_202611.md: peak of the allocator, GiB
    (Precision.fp8_blockwise, {}, NOTHING, 1, 116.96),
    (Precision.fp8_blockwise, IN_BACKWARD, NOTHING, 1, 116.97),
    (Precision.fp8_blockwise, IN_BACKWARD, MLP, 1, 102.18),
    (Precision.fp8_blockwise, IN_BACKWARD, ALL, 1, 72.52),
    (Precision.fp8_blockwise, IN_BACKWARD, ALL, 4, 93.25),
    (Precision.bf16, {}, NOTHING, 1, 105.27),
]


@pytest.mark.parametrize(("precision", "optimizer", "kinds", "rows", "gib"), MEASURED)
def test_plan_is_within_two_per_cent_of_what_was_measured(published, precision, optimizer, kinds, rows, gib):
    config = training(rows, **(BF16 | {"state_dtype": StateDtype.int8} | optimizer))
    engine = EngineConfig(precision=precision, activation_checkpointing=kinds)
    assert training_memory(published("12b"), config, engine).peak / GIB == pytest.approx(gib, rel=0.02)


def test_gradients_that_accumulate_stay_through_the_next_micro_batch(published):
    one, more = (
        training_memory(published("12b"), training(1, total, **BF16), EngineConfig(precision=Precision.bf16))
        for total in (1, 4)
    )
    assert more.peak == one.peak + one.gradients  # activations outweigh gradients here


def test_suggestions_need_less_and_less(published):
    engine, config = EngineConfig(precision=Precision.bf16), training(4, **{"gradient_clip": 1.0})
    peaks = [training_memory(published("12b"), config, engine).peak]
    names = []
    for name, less_training, less_engine in smaller_configurations(config, engine):
        less_training.validate("stage.training")
        less_training.validate_batch("stage.training", 1)
        names.append(name.split()[-1].split("=")[0].split(".")[-1])
        peaks.append(training_memory(published("12b"), less_training, less_engine).peak)
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    assert names == ["micro_batch_size", "activation_checkpointing", "state_dtype", "parameter_dtype"]


def test_suggestions_know_what_is_chosen_already():
    done = training(**(BF16 | {"state_dtype": StateDtype.int8, "in_backward": True, "gradient_clip": 0.0}))
    assert (
        list(smaller_configurations(done, EngineConfig(precision=Precision.bf16, activation_checkpointing=ALL))) == []
    )
    fp32 = [name for name, _, _ in smaller_configurations(training(), EngineConfig(precision=Precision.fp32))]
    assert not any("parameter_dtype" in name for name in fp32)


def test_checkpointing_keeps_inputs_only(published):
    model = published("12b")
    engine = EngineConfig(precision=Precision.bf16)
    config = training(**BF16)
    plain, less = (
        training_memory(model, config, replace(engine, activation_checkpointing=kinds)).activations
        for kinds in (ActivationCheckpointingConfig(), ALL)
    )
    assert less == 8192 * (62 + 2) * 5120 * 2
    assert plain > 10 * less
