"""How long N ranks stand still for a save: the saver in the background, the same save waited for, and torch's own."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanotrain.checkpoint.resume import find_defect, list_states
from nanotrain.checkpoint.saver import StateSaver
from nanotrain.config.engine import EngineConfig
from nanotrain.engines import build_engine
from nanotrain.engines.torch_engine import TorchEngine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import build_meta_model
from nanotrain.runtime.distributed import current_world, from_all, from_first, on_any_rank, wait_for_all
from tests.benchmarks.measure import state_tensors
from tests.multi_gpu.shapes import GPU, Shape

BEFORE, MOST_AFTER, FIRST = 5, 60, 3
WIDE = replace(
    GPU.model,
    hybrid_layer_pattern="M-*M-",
    vocab_size=32768,
    hidden_size=5120,
    intermediate_size=20480,
    num_attention_heads=40,
)
"""Five layers of the 12B: 14 GB of fp32 weights and states over all ranks."""
WIDE_LENGTH = 8192


@dataclass(frozen=True)
class Save:
    """What one save cost, the slowest rank's; seconds.

    Attributes:
        call: until the call returned.
        stall: what the call and the steps after it took longer than steps before.
        written: until it was on the disk.
        steps_beside: trained meanwhile.
    """

    call: float
    stall: float
    written: float
    steps_beside: int

    def row(self) -> dict[str, float | int]:
        return {name: round(value, 4) for name, value in vars(self).items()}


class Training:
    """An engine that trains on random tokens, one micro-batch a rank and step."""

    def __init__(self, shape: Shape, config: EngineConfig) -> None:
        model, self._length = (WIDE, WIDE_LENGTH) if shape is GPU else (shape.model, shape.length)
        training = shape.training(
            steps=1000, global_batch_size=current_world().size, micro_batch_size=1, sequence_length=self._length
        )
        engine = build_engine(config, build_meta_model(model), training)
        assert isinstance(engine, TorchEngine)
        self.engine, self._step = engine, 0
        with torch.no_grad():  # on the device: drawing a billion numbers on the CPU takes longer than all saves
            for name, parameter in engine._model.named_parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                torch.nn.init.normal_(local, std=0.01) if parameter.ndim > 1 else local.fill_(
                    1.0 if "norm" in name else 0.1
                )

    def step(self) -> float:
        """Do one step and return its wall clock; the loss is read, so the device is through."""
        generator = torch.Generator().manual_seed(1000 * self._step + current_world().rank)
        self._step += 1
        ids = torch.randint(0, self.engine.model_config.vocab_size, (1, self._length + 1), generator=generator)
        batch = MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        started = time.perf_counter()
        result = self.engine.train_step([batch], CrossEntropy(), 1e-5)
        assert not result.skipped
        return time.perf_counter() - started

    def tensors(self) -> dict[str, Tensor]:
        """Return what a state holds, for torch's own checkpoint."""
        return state_tensors(self.engine)


def measure(training: Training, save: Callable[[], Callable[[], bool]]) -> Save:
    """Save once in the midst of training.

    Args:
        training: warm.
        save: begins a save and returns a function that says whether this rank still writes.
    """
    pace = statistics.median(training.step() for _ in range(BEFORE))
    wait_for_all()
    started = time.perf_counter()
    writing = save()
    call = time.perf_counter() - started
    steps, written, beside = [], call, 0
    while len(steps) < MOST_AFTER and ((still := on_any_rank(writing())) or len(steps) < FIRST):
        steps.append(training.step())
        if still:
            written, beside = time.perf_counter() - started, len(steps)
    stall = call + sum(seconds - pace for seconds in steps[:FIRST])
    slowest = [max(values) for values in zip(*from_all((call, stall, written)), strict=True)]
    return Save(*slowest, beside)


def measure_saves(shape: Shape, config: EngineConfig) -> dict[str, Any]:
    """Return the row of all kinds of saves; the state that the last one in the background left must be whole."""
    training = Training(shape, config)
    warm = [training.step() for _ in range(3)]
    size = sum(from_all(sum(local(t).numel() * t.element_size() for t in training.tensors().values())))
    memory = Path("/dev/shm")
    roomy = current_world().is_first and memory.is_dir() and shutil.disk_usage(memory).free > 4 * size
    root = from_first(Path(tempfile.mkdtemp(dir=memory if roomy else None)) if current_world().is_first else Path())
    saver, found = StateSaver(root / "ours", 1), {}

    def background(step: int) -> Callable[[], Callable[[], bool]]:
        def begin() -> Callable[[], bool]:
            saver.start(step, training.engine.snapshot_state(), {"step": step})
            return lambda: saver.busy

        return begin

    def waited_for() -> Callable[[], bool]:
        background(3)()
        saver.finish()
        return lambda: False

    def torchs_own() -> Callable[[], bool]:
        dcp.save(training.tensors(), checkpoint_id=root / "dcp")
        return lambda: False

    try:
        for name, save in {
            "background, first": background(1),
            "background": background(2),
            "waited for": waited_for,
            "torch DCP, waited for": torchs_own,
        }.items():
            found[name] = measure(training, save)
            saver.finish()
        states = list_states(root / "ours")
        whole = [step for step, _ in states] == [3] and find_defect(states[-1][1]) is None
    finally:
        wait_for_all()
        if current_world().is_first:
            shutil.rmtree(root, ignore_errors=True)
    faster = found["background"].stall < found["waited for"].stall
    return {
        "ranks": current_world().size,
        "state_gb": round(size / 1e9, 3),
        "folder": str(root.parent),
        "step_seconds": round(statistics.median(warm[1:]), 4),
        **{name: save.row() for name, save in found.items()},
        "whole": whole,
        "passed": whole and (faster or shape is not GPU),
    }


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
