"""What a rank waited for, against a rank that is known to be late; and who of two ranks writes."""

import json
import time
from pathlib import Path

import pytest
import torch

from nanotrain.config.engine import Device, EngineConfig, Precision, TrackerKind, TrackingConfig
from nanotrain.config.parallel import DataParallel
from nanotrain.config.training import TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.engines.base import Engine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.hybrid import build_meta_model
from nanotrain.runtime.distributed import current_world
from nanotrain.runtime.run import Run
from nanotrain.runtime.tracking import build_tracker
from nanotrain.training.loop import train
from tests.conftest import TINY, RandomLoader, random_batch
from tests.ranks import run_ranks

LATE = 0.4
"""Seconds; the last rank is late by them."""
ROUNDS = 3
"""On a loaded machine any rank may be late in one of them."""


class SleepsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(LATE)
        return gradient


class LateLoss(CrossEntropy):
    def __call__(self, head, batch):
        output = super().__call__(head, batch)
        late = current_world().rank == current_world().size - 1
        return output._replace(loss_sum=SleepsInBackward.apply(output.loss_sum)) if late else output


def engine_of(kind: DataParallel, device: Device = Device.cpu):
    config = EngineConfig(device=device, precision=Precision.fp32, data_parallel=kind)
    training = TrainingConfig(steps=3, global_batch_size=8, micro_batch_size=2, sequence_length=12, learning_rate=1e-3)
    engine = build_engine(config, build_meta_model(TINY), training)
    engine.init_weights(0)
    return engine, config, training


def waits_of(engine: Engine) -> dict[str, list[tuple[float | None, float]]]:
    """Return, for each way to be late, what this rank measured as waiting, and the wall clock of the steps."""
    waits = {}
    ways = [("even", CrossEntropy(), 0.0), ("backward", LateLoss(), 0.0), ("data", CrossEntropy(), LATE)]
    for name, loss, loads in ways * ROUNDS:
        time.sleep(loads * current_world().rank)
        started = time.perf_counter()
        engine.train_step([random_batch(2, 0), random_batch(2, 1)], loss, 1e-3)
        waits.setdefault(name, []).append((engine.communication_seconds, time.perf_counter() - started))
    return waits


def check(early: dict, late: dict) -> None:
    """Assert that the early rank waited for the late one, and not the other way."""
    assert all(0 <= wait < step for rows in (*early.values(), *late.values()) for wait, step in rows)
    for name in ("backward", "data"):
        assert max(early[name])[0] > LATE * 0.8, name
        assert min(late[name])[0] < LATE / 2, name
    assert min(early["even"])[0] < LATE / 2 and min(late["even"])[0] < LATE / 2


def measure(folder: str) -> dict:
    rank = current_world().rank
    engine, config, training = engine_of(DataParallel.ddp)
    waits = waits_of(engine)
    run = Run("t", "pretrain", Path(folder), 1, config, TrackingConfig(kind=TrackerKind.tensorboard))
    train(engine, RandomLoader(), LateLoss(), training, run)
    other = Path(folder) / f"of-rank-{rank}"
    tracker = build_tracker(TrackingConfig(), other, "run", {})
    if rank > 0:
        tracker.log(1, {"loss": 1.0})
    tracker.close()
    fsdp2 = engine_of(DataParallel.fsdp2)[0]
    fsdp2.train_step([random_batch(2, 0)], CrossEntropy(), 1e-3)
    return {"waits": waits, "fsdp2": fsdp2.communication_seconds}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(measure, 2, str(folder))


def test_the_early_rank_waits_for_the_late_one_and_not_the_other_way(measured):
    check(*(result["waits"] for result in measured[1]))
    assert all(result["fsdp2"] is None for result in measured[1])  # not measured, and said so


def test_one_process_measures_no_communication():
    engine, _, _ = engine_of(DataParallel.auto)
    engine.train_step([random_batch(2, 0)], CrossEntropy(), 1e-3)
    assert engine.communication_seconds is None


def test_only_the_first_rank_writes_and_its_lines_have_the_wait(measured):
    folder = measured[0]
    lines = [json.loads(line) for line in (folder / "pretrain/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert max(line["communication_seconds"] for line in lines) > LATE * 0.8
    assert all(line["compute_seconds"] > 0 for line in lines)
    assert len(list((folder / "pretrain/tensorboard").iterdir())) == 1
    assert (folder / "of-rank-0").is_dir() and not (folder / "of-rank-1").exists()
