"""Training on the ranks of a check: connecting them, global batches, and how far two curves are apart."""

import gc
import time
from datetime import timedelta
from functools import cache
from typing import Any

import torch

from nanotrain.config.engine import Device, Precision
from nanotrain.engines.base import Engine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch
from nanotrain.runtime.distributed import World, start_ranks
from tests.multi_gpu.shapes import CPU, LEARNING_RATE, TOLERANCE, Shape, patience

COLLECTIVE_SECONDS = 60
"""After so long in one collective a rank is taken for lost, and all of them end."""
Numbers = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


def connect(shape: Shape) -> World:
    """Start this rank; a collective that some rank does not come to ends it after `COLLECTIVE_SECONDS`."""
    return start_ranks(timedelta(seconds=COLLECTIVE_SECONDS * patience(cpu=shape is CPU)))


@cache
def prepare_megatron(device: Device) -> None:
    """Let Megatron-Core run on CPU ranks where they are that, and shorten the waits of its groups."""
    if device is Device.cpu:
        from tests import megatron_cpu

        megatron_cpu.install()
    from nanotrain.engines import megatron_engine

    seconds = COLLECTIVE_SECONDS * patience(cpu=device is Device.cpu)
    megatron_engine.COLLECTIVE_TIMEOUT = timedelta(seconds=seconds)


def all_batches(shape: Shape, step: int, *, packed: bool) -> list[MicroBatch]:
    """Return a step's micro-batches for all ranks; they differ in how many labels count, and one has none.

    Args:
        shape: sizes.
        step: steps alternate between two sets of tokens.
        packed: rows hold about five documents each; else one.
    """
    generator = torch.Generator().manual_seed(step % 2)
    number, length = shape.MICRO_BATCHES * shape.rows, shape.length
    ids = torch.randint(0, shape.model.vocab_size, (number, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    share = torch.linspace(0.0, 0.9, number)[:, None]
    labels[torch.rand(number, length, generator=generator) < share] = IGNORE_INDEX
    documents = (torch.rand(number, length, generator=generator) < 4 / length).cumsum(1).to(torch.int32)
    batches = []
    for first in range(0, number, shape.rows):
        rows = slice(first, first + shape.rows)
        segments = documents[rows].contiguous() if packed else None
        batches.append(MicroBatch(ids[rows, :-1].contiguous(), labels[rows].contiguous(), segments))
    batches[3].labels.fill_(IGNORE_INDEX)
    return batches


def train(engine: Engine, shape: Shape, steps: range, *, packed: bool) -> Numbers:
    """Return loss and gradient norm of each step on this rank's part of the global batches."""
    found = []
    for step in steps:
        batches = all_batches(shape, step, packed=packed)
        each = len(batches) // engine.dp_size
        result = engine.train_step(batches[engine.dp_rank * each :][:each], CrossEntropy(), LEARNING_RATE)
        assert not result.skipped, f"step {step} was skipped: loss {result.loss}, gradient norm {result.grad_norm}"
        found.append((result.loss, result.grad_norm))
    return found


def largest_differences(found: Numbers, expected: Numbers) -> tuple[float, float]:
    """Return the largest relative difference of the losses and of the gradient norms."""
    assert len(found) == len(expected) > 0
    pairs = [(abs(a - b) / abs(b), abs(m - n) / abs(n)) for (a, m), (b, n) in zip(found, expected, strict=True)]
    return max(loss for loss, _ in pairs), max(norm for _, norm in pairs)


def judge(found: Numbers, expected: Numbers, precision: Precision) -> dict[str, Any]:
    """Return the numbers of a case, how far they are from the reference's, and whether that is near enough."""
    row: dict[str, Any] = {"losses": [loss for loss, _ in found], "gradient_norms": [norm for _, norm in found]}
    near = True
    for where, tolerance, steps in zip(("first_step", "all_steps"), TOLERANCE[precision], (1, len(found)), strict=True):
        loss, norm = largest_differences(found[:steps], expected[:steps])
        row[where] = {"loss": float(f"{loss:.3g}"), "gradient_norm": float(f"{norm:.3g}"), "tolerance": tolerance}
        near = near and loss <= tolerance[0] and norm <= tolerance[1]
    return row | {"passed": near}


def free_memory() -> None:
    """Give back what engines that are no longer referred to have held; hooks refer in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def stop_megatron() -> None:
    """Forget Megatron's groups, so that the next engine of this process may have another layout."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self._started, 2)
