"""Estimated step times: against measured ones of one GPU, and how each kind of splitting must change them."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from nanotrain.config.engine import ActivationCheckpointingConfig, EngineConfig, EngineKind, Precision
from nanotrain.config.megatron import MegatronConfig, Recompute
from nanotrain.config.model import ModelConfig
from nanotrain.config.parallel import DataParallel
from nanotrain.config.training import TrainingConfig
from nanotrain.planning.step_time import H100, H200, micro_batch_seconds, step_time

TRAINING = TrainingConfig(steps=1, global_batch_size=2, micro_batch_size=1, sequence_length=8192, learning_rate=1e-4)
BF16, FP8 = Precision.bf16, Precision.fp8_blockwise
EVERYTHING = ActivationCheckpointingConfig(mamba=True, mlp=True, attention=True)


@pytest.mark.parametrize(("precision", "measured_ms"), [(FP8, 851.7 - 11), (BF16, 1075.9 - 11)])
def test_a_pass_of_the_12b_takes_what_was_measured(
    published: Callable[[str], ModelConfig], precision, measured_ms
) -> None:
    """docs/benchmarks/one_gpu_h200_202611.md: the peer, whose layers Megatron brings; its loss costs 11 ms more than ours."""
    seconds = micro_batch_seconds(published("12b"), EngineConfig(precision=precision), 8192, 8192, H200)
    assert 1e3 * seconds == pytest.approx(measured_ms, rel=0.04)


def test_checkpointed_layers_pass_forward_again(published: Callable[[str], ModelConfig]) -> None:
    model, plain = published("12b"), EngineConfig(precision=BF16)
    once = micro_batch_seconds(model, plain, 8192, 8192, H200)
    forward = micro_batch_seconds(model, plain, 8192, 8192, H200, backward=False)
    everything = micro_batch_seconds(model, replace(plain, activation_checkpointing=EVERYTHING), 8192, 8192, H200)
    assert everything == pytest.approx(once + forward)


@pytest.mark.parametrize(("precision", "measured_ms"), [(BF16, 390.0), (FP8, 373.8)])
def test_a_step_of_seven_layers_takes_what_was_measured(
    published: Callable[[str], ModelConfig], precision, measured_ms
) -> None:
    """docs/benchmarks/megatron_h200_202611.md: two micro-batches, with the update."""
    model = replace(published("12b"), hybrid_layer_pattern="M-M*-M-")
    step = step_time(model, TRAINING, EngineConfig(kind=EngineKind.megatron, precision=precision), 1, H200)
    assert step is not None
    assert step.communication == 0
    assert 1e3 * step.total == pytest.approx(measured_ms, rel=0.08)


def megatron(world_size: int, batch: int, model: ModelConfig, card=H200, **options: object):
    engine = EngineConfig(kind=EngineKind.megatron, precision=FP8, megatron=MegatronConfig(**options))
    found = step_time(model, replace(TRAINING, global_batch_size=batch), engine, world_size, card)
    assert found is not None
    return found


def test_splitting_divides_work_and_adds_communication(published: Callable[[str], ModelConfig]) -> None:
    model = published("12b")
    one = megatron(1, 2, model)
    two = megatron(2, 2, model, tensor_parallel=2, sequence_parallel=True)
    four = megatron(4, 2, model, tensor_parallel=4, sequence_parallel=True)
    assert two.compute == pytest.approx(one.compute / 2)
    assert (four.update, four.compute) == pytest.approx((one.update / 4, one.compute / 4))
    # all layers and the two ends: bytes by hand, over the bus
    exchanged = 2 * (62 * 5 + 4) * (8192 * 5120 * 2) / H200.bus_bandwidth
    assert (two.communication, four.communication) == pytest.approx((exchanged / 2, exchanged * 3 / 4))
    data = megatron(4, 8, model)
    assert data.compute == pytest.approx(one.compute)  # equal work a rank
    assert data.update == pytest.approx(one.update / 4)
    assert 0 < data.communication < four.communication  # weights in one byte; gradients hide behind the backward pass
    piped = megatron(4, 8, model, pipeline_parallel=4)
    assert piped.compute == pytest.approx((one.compute) * (8 + 3) / 8, rel=0.05)
    slower = megatron(1, 2, model, card=H100)
    assert 1.05 < slower.compute / one.compute < 1.4
    again = megatron(1, 2, model, recompute=Recompute.full)
    assert again.compute / one.compute == pytest.approx(4 / 3, rel=0.07)


def test_context_parallelism_exchanges_heads_for_positions(published: Callable[[str], ModelConfig]) -> None:
    model = replace(published("12b"), hybrid_layer_pattern="M")
    two = megatron(2, 1, model, context_parallel=2, distributed_optimizer=False, fp8_parameters=False)
    values = 8192 // 2 * (model.in_proj_size + 10240)  # in before the scan and out after it, forward and backward
    assert two.communication == pytest.approx(2 * 2 * values / 2 / H200.bus_bandwidth)
    assert two.compute == pytest.approx(megatron(1, 1, model).compute / 2, rel=0.1)  # each adds up all gradients


def test_fsdp2_hides_its_layers_and_what_is_unknown_has_no_time(published: Callable[[str], ModelConfig]) -> None:
    model = published("12b")
    engine = EngineConfig(precision=BF16, data_parallel=DataParallel.fsdp2)
    step = step_time(model, replace(TRAINING, global_batch_size=4), engine, 4, H200)
    assert step is not None
    outer = 8 * 2 * 131072 * 5120 * 3 / 4 / H200.bus_bandwidth
    assert step.communication == pytest.approx(outer)  # 74 GB of layers take 0.21 s, the passes 1.06 s
    assert step_time(model, TRAINING, replace(engine, precision=Precision.fp32), 4, H200) is None
    deepspeed = EngineConfig(kind=EngineKind.deepspeed, precision=BF16)
    assert step_time(model, TRAINING, deepspeed, 4, H200) is None
