"""DDP and FSDP2 in bf16: two ranks against one process; over NCCL where each has a GPU; DDP over gloo where they share one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanotrain.config.engine import ActivationCheckpointingConfig, Device, EngineConfig, Precision
from nanotrain.config.model import ModelConfig
from nanotrain.config.parallel import DataParallel, Fsdp2Config
from nanotrain.config.training import TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.engines.base import Engine
from nanotrain.losses.distillation import ForwardKL
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.hybrid import build_meta_model
from nanotrain.runtime.distributed import wait_for_all
from tests.conftest import random_batch
from tests.engines.parallel_runs import here
from tests.gpu.test_training import NARROW_12B
from tests.ranks import run_ranks

TRAINING = TrainingConfig(steps=6, global_batch_size=8, micro_batch_size=2, sequence_length=256, learning_rate=1e-3)
CHECKPOINTED = ActivationCheckpointingConfig(mamba=True, mlp=True, attention=True)
KINDS = {
    "ddp": {"data_parallel": DataParallel.ddp},
    "fsdp2": {"data_parallel": DataParallel.fsdp2, "activation_checkpointing": CHECKPOINTED},
    "fsdp2_kept": {"data_parallel": DataParallel.fsdp2, "fsdp2": Fsdp2Config(False, True)},
}


def build(config: EngineConfig, model: ModelConfig, seed: int = 0) -> Engine:
    engine = build_engine(config, build_meta_model(model), TRAINING)
    engine.init_weights(seed)
    return engine


def train(engine: Engine, steps) -> list[tuple[float, float]]:
    rank, size = here()
    numbers = []
    for step in steps:
        batches = [random_batch(2, 10 * step + number, 256, engine.model_config.vocab_size) for number in range(4)][
            rank::size
        ]
        result = engine.train_step(batches, CrossEntropy(), 1e-3)
        assert not result.skipped
        numbers.append((result.loss, result.grad_norm))
    return numbers


def run(config: EngineConfig, folder: Path, model: ModelConfig):
    """Return six steps, and the last three again from a state saved after the third."""
    engine = build(config, model)
    numbers = train(engine, range(3))
    if here()[0] == 0:
        folder.mkdir()
    wait_for_all()
    engine.save_state(folder)
    wait_for_all()
    numbers += train(engine, range(3, 6))
    again = build(config, model, seed=9)
    again.load_state(folder)
    resumed = train(again, range(3, 6))
    engine.save_hf(folder / "hf")
    assert engine.first_difference(folder / "hf") is None
    teacher = build_engine(config, build_meta_model(model))
    teacher.load_hf(folder / "hf")
    batch = random_batch(2, 99, 256, model.vocab_size)
    batch = replace(batch, teacher_hidden_states=teacher.hidden_states([batch])[0])
    with teacher.head() as head:
        divergence = engine.evaluate([batch], ForwardKL(head))["loss"]
    return numbers, resumed, divergence


def run_on_ranks(base: EngineConfig, folder: Path, model: ModelConfig):
    return {name: run(replace(base, **changes), folder / name, model) for name, changes in kinds(base.device).items()}


def kinds(device: Device) -> dict[str, dict]:
    """Return what the ranks can do: FSDP2 refuses to share a GPU."""
    alone = device is not Device.cpu and torch.cuda.device_count() < 2
    return {"ddp": KINDS["ddp"]} if alone else KINDS


def check(device: Device, folder: Path, model: ModelConfig) -> None:
    base = EngineConfig(device=device, precision=Precision.bf16)
    one, _, _ = run(base, folder / "one", model)
    for reports in run_ranks(run_on_ranks, 2, base, folder, model):
        assert set(reports) == set(kinds(device))
        for name, (numbers, resumed, divergence) in reports.items():
            assert [a for a, _ in numbers] == pytest.approx([a for a, _ in one], rel=2e-3), name
            assert [n for _, n in numbers] == pytest.approx([n for _, n in one], rel=3e-2), name
            assert [a for a, _ in resumed] == pytest.approx([a for a, _ in numbers[3:]], rel=1e-3), name
            assert divergence == pytest.approx(0.0, abs=1e-4), name


def test_two_ranks_train_as_one_process(tmp_path):
    check(Device.cuda, tmp_path, NARROW_12B)
