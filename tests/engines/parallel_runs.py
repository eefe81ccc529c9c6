"""Runs that the tests of the engines on several ranks compare: the same on every engine, a function of rank and size."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanotrain.config.engine import Device, EngineConfig, Precision
from nanotrain.config.training import OptimizerConfig, TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.engines.base import Engine
from nanotrain.losses.distillation import ForwardKL
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch
from nanotrain.model.hybrid import build_meta_model
from nanotrain.runtime.distributed import wait_for_all
from tests.conftest import TINY, random_batch

FP32 = EngineConfig(device=Device.cpu, precision=Precision.fp32)
BF16 = replace(FP32, precision=Precision.bf16)
RATE = 3e-3
CLIP = 1.0

Numbers = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


def training(**optimizer) -> TrainingConfig:
    return TrainingConfig(
        steps=20, global_batch_size=8, micro_batch_size=2, sequence_length=12, learning_rate=RATE,
        optimizer=OptimizerConfig(**({"gradient_clip": CLIP} | optimizer)),
    )  # fmt: skip


def here() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def global_batch(step: int) -> list[MicroBatch]:
    """This rank's of four packed micro-batches with very different numbers of labels; the last has none."""
    batches = [random_batch(2, 10 * step + number) for number in range(4)]
    batches[1].labels[:, 3:] = IGNORE_INDEX
    batches[3].labels.fill_(IGNORE_INDEX)
    rank, size = here()
    return batches[rank::size]


def build(config: EngineConfig, model=TINY, seed: int = 0, **optimizer) -> Engine:
    engine = build_engine(config, build_meta_model(model), training(**optimizer))
    engine.init_weights(seed)
    return engine


def train(engine: Engine, steps, loss_fn=None, teacher: Engine | None = None) -> Numbers:
    numbers = []
    for step in steps:
        batches = global_batch(step)
        if teacher is not None:
            hidden = teacher.hidden_states(batches)
            batches = [replace(b, teacher_hidden_states=h) for b, h in zip(batches, hidden, strict=True)]
        result = engine.train_step(batches, loss_fn or CrossEntropy(), RATE)
        assert not result.skipped
        numbers.append((result.loss, result.grad_norm))
    return numbers


def distill(config: EngineConfig) -> Numbers:
    """Three steps towards a teacher that is divided as the student is."""
    teacher = build_engine(config, build_meta_model(TINY))
    teacher.init_weights(5)
    with teacher.head() as head:
        return train(build(config), range(3), ForwardKL(head), teacher)


class PoisonedOn(CrossEntropy):
    """Not a number on one rank only."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, head, batch):
        output = super().__call__(head, batch)
        return output._replace(loss_sum=output.loss_sum * float("nan")) if here()[0] == self._rank else output


def skip_one(engine: Engine, folder: Path) -> tuple[bool, str | None, bool]:
    """Return whether a step was skipped, what it changed, and whether the step after it was."""
    engine.save_hf(folder)
    skipped = engine.train_step(global_batch(50), PoisonedOn(here()[1] - 1), RATE).skipped
    changed = engine.first_difference(folder)
    return skipped, changed, engine.train_step(global_batch(51), CrossEntropy(), RATE).skipped


@dataclass
class Report:
    """What one rank saw of one kind of engine."""

    steps: Numbers
    resumed: Numbers
    evaluation: dict[str, float]
    logprobs: torch.Tensor
    difference: str | None
    skips: tuple[bool, str | None, bool]
    distilled: Numbers


def run_kind(config: EngineConfig, folder: Path, steps: int = 20) -> Report:
    """Train, save state and weights below `folder`, resume from the middle, and the rest of a `Report`."""
    engine = build(config)
    middle = steps // 2
    numbers = train(engine, range(middle))
    write = engine.snapshot_state()
    numbers += train(engine, range(middle, steps))  # what a snapshot holds does not move with the weights
    if here()[0] == 0:
        (folder / "state").mkdir(parents=True)
    wait_for_all()
    write(folder / "state")
    wait_for_all()
    engine.save_hf(folder / "hf")
    difference = engine.first_difference(folder / "hf")
    evaluation = engine.evaluate([random_batch(2, 90 + here()[0])], CrossEntropy())
    logprobs = engine.logprobs(random_batch(2, 90))
    again = build(config, seed=9)
    again.load_state(folder / "state")
    torch.manual_seed(5)
    resumed = train(again, range(middle, steps))
    skips = skip_one(engine, folder / "before")
    return Report(numbers, resumed, evaluation, logprobs, difference, skips, distill(config))


def close(one: Numbers, other: Numbers, loss: float = 2e-6, norm: float = 1e-5) -> None:
    """Assert equal losses and gradient norms, step by step, within relative tolerances."""
    assert len(one) == len(other) > 0
    for step, ((a, m), (b, n)) in enumerate(zip(one, other, strict=True)):
        assert b == pytest.approx(a, rel=loss), f"loss of step {step}"
        assert n == pytest.approx(m, rel=norm), f"gradient norm of step {step}"
