"""How long training stands still for a save: ours beside torch's distributed checkpoint, blocking and asynchronous.

    python -m tests.benchmarks.bench_save_stall OUT.jsonl [--tiny] [--seconds 300]

The 12B shape at half depth, bf16 weights, int8 optimizer states, 8,192 random tokens a step, one GPU. The stall of a save is
what the steps from it on took longer than the median step before it, until the save is written and training is back to its
pace; the call alone is reported beside it. "Staged" = the state is copied on the GPU first (checkpoint/host_snapshot.py),
"unstaged" = it crosses directly. "Alone" = the snapshot without anything that writes it. All others write the same tensors to
the same place. Every row is written at once, and no new save begins after --seconds.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from nanotrain.checkpoint.saver import StateSaver
from nanotrain.config.engine import EngineConfig, Precision
from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype, TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.engines.torch_engine import TorchEngine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import build_meta_model
from tests.benchmarks.bench_memory_12b import published_12b, random_weights
from tests.benchmarks.measure import state_tensors
from tests.conftest import TINY

MAX_STEPS_AFTER = 60
MAX_SECONDS = 120.0
"""Of one save; nothing else is measured while it is being written."""
BEFORE = 6


class Training:
    """An engine and its clock."""

    def __init__(self, tiny: bool) -> None:
        config = published_12b()
        config = TINY if tiny else replace(config, hybrid_layer_pattern=config.hybrid_layer_pattern[:31])
        self.tokens = 64 if tiny else 8192
        optimizer = OptimizerConfig(parameter_dtype=ParameterDtype.bf16, state_dtype=StateDtype.int8)
        training = TrainingConfig(
            steps=1000, global_batch_size=1, micro_batch_size=1, sequence_length=self.tokens, learning_rate=1e-5,
            optimizer=optimizer,
        )  # fmt: skip
        engine = build_engine(EngineConfig(precision=Precision.bf16), build_meta_model(config), training)
        assert isinstance(engine, TorchEngine)
        self.engine, self.vocab_size = engine, config.vocab_size
        random_weights(engine._model)
        self._step = 0

    def step(self) -> float:
        """Do one step and return its wall clock; the loss is read, so the device is through."""
        generator = torch.Generator().manual_seed(self._step)
        self._step += 1
        ids = torch.randint(0, self.vocab_size, (1, self.tokens + 1), generator=generator)
        started = time.perf_counter()
        self.engine.train_step([MicroBatch(ids[:, :-1].clone(), ids[:, 1:].clone())], CrossEntropy(), 1e-5)
        return time.perf_counter() - started

    def tensors(self) -> dict[str, Tensor]:
        """Return what a state holds, for torch's own checkpoint."""
        return state_tensors(self.engine)


def measure(training: Training, name: str, save: Callable[[], Callable[[], bool]]) -> dict[str, object]:
    """Save once in the middle of training, and wait until it is written.

    Args:
        training: warm.
        name: of the row.
        save: begins a save and returns a function that says whether it is written.
    """
    before = [training.step() for _ in range(BEFORE)]
    pace = statistics.median(before)
    started = time.perf_counter()
    written = save()
    call = time.perf_counter() - started
    steps = [training.step()]
    while not written() and len(steps) < MAX_STEPS_AFTER:
        steps.append(training.step())
    writing = time.perf_counter() - started
    in_time = written()
    steps += [training.step() for _ in range(2)]
    first = call + sum(seconds - pace for seconds in steps[:3])
    return {
        "what": name,
        "pace_seconds": pace,
        "pace_spread_seconds": max(before) - min(before),
        "call_seconds": call,
        "stall_of_first_three_steps_seconds": first,
        "stall_until_written_seconds": call + sum(seconds - pace for seconds in steps),
        "steps_while_writing": len(steps) - 2,
        "written_after_seconds": writing if in_time else _wait_until(written, started),
    }


def _wait_until(written: Callable[[], bool], started: float) -> float | None:
    """Return how long a save took that outlasted the steps beside it; None after `MAX_SECONDS`."""
    while not written() and time.perf_counter() - started < MAX_SECONDS:
        time.sleep(0.05)
    return time.perf_counter() - started if written() else None


def alone(training: Training, staged: bool) -> Callable[[], Callable[[], bool]]:
    host = training.engine._host

    def begin() -> Callable[[], bool]:
        host.max_staged_bytes = None if staged else 0
        training.engine.snapshot_state()
        return lambda: True

    def begin_when_free() -> Callable[[], bool]:
        host.wait()
        return begin()

    return begin_when_free


def ours(training: Training, saver: StateSaver, step: int, staged: bool = True) -> Callable[[], Callable[[], bool]]:
    def begin() -> Callable[[], bool]:
        saver.finish()
        training.engine._host.max_staged_bytes = None if staged else 0
        saver.start(step, training.engine.snapshot_state(), {"step": step})
        return lambda: not saver.busy

    return begin


def blocking_dcp(training: Training, folder: Path) -> Callable[[], Callable[[], bool]]:
    def begin() -> Callable[[], bool]:
        dcp.save(training.tensors(), checkpoint_id=folder)
        return lambda: True

    return begin


def async_dcp(training: Training, folder: Path, stager: BlockingAsyncStager | None) -> Callable[[], Callable[[], bool]]:
    def begin() -> Callable[[], bool]:
        options = {} if stager is None else {"async_stager": stager}
        future = dcp.async_save(training.tensors(), checkpoint_id=folder, **options)
        done = future if hasattr(future, "done") else future.upload_completion
        return done.done

    return begin


def memory(training: Training) -> dict[str, object]:
    """Return what the GPU held, in GiB: the peak of steps alone, and the most that the allocator kept, copies included."""
    if not torch.cuda.is_available():
        return {}
    host = training.engine._host
    free, total = torch.cuda.mem_get_info()
    bytes_ = {
        "step_peak": host._step_peak,
        "staged": host.staged_bytes,
        "reserved_peak": torch.cuda.max_memory_reserved(),
    }
    bytes_ |= {"free": free, "total": total}
    return {f"{name}_gib": round(value / 2**30, 2) for name, value in bytes_.items()} | {
        "gpu": torch.cuda.get_device_name()
    }


def place(size: int) -> Path:
    """Return a folder in memory where it fits three times beside the process's own memory, else on the disk."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 * size
    return Path(tempfile.mkdtemp(dir=memory if roomy else None))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on the CPU")
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    started = time.perf_counter()
    training = Training(options.tiny)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name)
    warm = [training.step() for _ in range(3)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in training.tensors().values())
    root = place(size)
    saver = StateSaver(root / "ours", 1)
    cached = BlockingAsyncStager(cache_staged_state_dict=True)
    cases = [("alone, staged, first (allocates and pins)", alone(training, True))]
    for number in ("1", "2", "3"):
        cases += [
            (f"alone, staged, {number}", alone(training, True)),
            (f"alone, unstaged, {number}", alone(training, False)),
        ]
    cases += [
        ("ours, staged", ours(training, saver, 1)),
        ("torch DCP, blocking", blocking_dcp(training, root / "blocking")),
        ("torch DCP, async", async_dcp(training, root / "async", None)),
        ("ours, unstaged", ours(training, saver, 2, staged=False)),
    ]
    if torch.cuda.is_available():  # it pins
        cases += [
            ("torch DCP, async, staging cached, first", async_dcp(training, root / "cached-1", cached)),
            ("torch DCP, async, staging cached, second", async_dcp(training, root / "cached-2", cached)),
        ]
    cases.append(("ours, staged, again", ours(training, saver, 3)))
    print(
        f"state {size / 1e9:.1f} GB in {root}, warm after {time.perf_counter() - started:.0f} s, first steps {warm}",
        flush=True,
    )
    with options.out.open("a", encoding="utf-8") as out:
        for name, begin in cases:
            elapsed = time.perf_counter() - started
            if elapsed > options.seconds:
                print(f"{name}: left out, {elapsed:.0f} s have passed")
                continue
            row = measure(training, name, begin)
            row |= {"state_bytes": size, "torch": torch.__version__, "place": str(root.parent)} | memory(training)
            out.write(json.dumps(row) + "\n")
            out.flush()
            written = row["written_after_seconds"]
            print(
                f"{name:42} call {row['call_seconds']:7.3f} s, stall (3 steps) {row['stall_of_first_three_steps_seconds']:7.3f} s,"
                f" until written {row['stall_until_written_seconds']:7.3f} s, written after {written}, pace {row['pace_seconds']:.3f}"
                f" +- {row['pace_spread_seconds']:.3f} s",
                flush=True,
            )
            for folder in root.iterdir():  # the memory that they lie in is needed for the next
                shutil.rmtree(folder, ignore_errors=True)
    saver.close()
    shutil.rmtree(root, ignore_errors=True)
    os._exit(0)  # nothing is waited for: a save of a library may still be under way


if __name__ == "__main__":
    main()
