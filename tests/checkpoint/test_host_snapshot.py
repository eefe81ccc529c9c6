"""The snapshot is of its moment whatever the GPU's streams do; with and without room for a copy on the GPU.

The streams are played here: what is queued on the side stream runs as late as the events allow, what is queued on the
training's own stream at once. tests/gpu/test_host_snapshot.py does the same on a real one.
"""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanotrain.checkpoint.host_snapshot import HostSnapshot, staging_budget

GIB = 2**30


def test_the_budget_keeps_the_peak_of_past_steps_and_a_margin_free():
    # One H200 beside half of the 12B, and the whole 12B without and with checkpointed layers.
    assert staging_budget(140 * GIB, 60 * GIB) > 27.5e9
    assert 0 < staging_budget(140 * GIB, 117 * GIB) < 49.6e9 < staging_budget(140 * GIB, int(72.5 * GIB))
    assert staging_budget(140 * GIB, 134 * GIB) == 0 == staging_budget(80 * GIB, 90 * GIB)
    for available in (10, 10**9, 10**11):
        for peak in (0, available // 3, available):
            assert staging_budget(available, peak) + peak <= max(available, peak)


def test_a_snapshot_is_of_its_moment_and_uses_its_memory_again():
    host = HostSnapshot(torch.device("cpu"))
    tensors = {"a": torch.randn(3, 5), "b": torch.tensor(7), "c": torch.randn(0, 2), "d": torch.ones(2, 2).bfloat16().T}
    copies = host.take(tensors)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["a"] += 1
    assert all(copies[name].equal(before[name]) and copies[name].dtype == before[name].dtype for name in tensors)
    assert all(copy.is_contiguous() for copy in copies.values())
    place = copies["a"].data_ptr()
    again = host.take(tensors)
    assert again["a"].data_ptr() == place and again["a"].equal(tensors["a"])
    assert host.take({"a": torch.zeros(1000)})["a"].equal(torch.zeros(1000))


class PlayedGpu(TorchFunctionMode):
    """Stands for the streams and the allocator of a GPU; its memory is the host's."""

    def __init__(self, free: int) -> None:
        super().__init__()
        self.free, self.peak = free, 100
        self.queue: list[Callable[[], object]] = []
        self.on_side = False
        self.host = HostSnapshot(torch.device("cuda", 0))
        self.guarded: list[int] = []
        """Bytes of the memory that was recorded as used by the side stream."""

    def run(self, until: int) -> None:
        """Run what was queued on the side stream before it had `until` entries."""
        for number in range(until):
            job, self.queue[number] = self.queue[number], lambda: None
            job()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.empty:
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        if func == Tensor.is_cuda.__get__:
            return args[0].dtype is not torch.int64  # those are the optimizer's counters on the CPU
        if func.__name__ == "copy_" and self.on_side:
            self.queue.append(lambda: Tensor.copy_(args[0], args[1]))
            return args[0]
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def side(self, stream: object):
        self.on_side = True
        yield
        self.on_side = False


@pytest.fixture
def play(monkeypatch):
    played: list[PlayedGpu] = []

    def play(free: int) -> PlayedGpu:
        gpu = PlayedGpu(free)
        played.append(gpu)

        class Event:
            def record(self, stream: object) -> None:
                self.until = len(gpu.queue)

            def synchronize(self) -> None:
                gpu.run(self.until)

        def wait_event(event: Event) -> None:
            gpu.run(event.until)

        main = SimpleNamespace(wait_event=wait_event)
        cuda = {
            "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "Event": Event,
            "stream": gpu.side,
            "current_stream": lambda device: main,
            "mem_get_info": lambda device: (gpu.free, 10 * gpu.free),
            "memory_reserved": lambda device: 0,
            "max_memory_allocated": lambda device: gpu.peak,
            "reset_peak_memory_stats": lambda device: setattr(gpu, "peak", 0),
            "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0),
            "check_error": lambda code: None,
        }
        for name, stand_in in cuda.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(
            Tensor, "record_stream", lambda tensor, stream: gpu.guarded.append(tensor.numel()), raising=False
        )
        return gpu

    yield play
    for gpu in played:
        gpu.host._arena = None  # it would be unregistered from a driver that is not there


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"weights/a": 4096, "optimizer/a/square": 2048, "weights/b": 1000, "weights/none": 0}
    drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return drawn | {"optimizer/a/step": torch.tensor(3), "narrow": torch.ones(64, 2).bfloat16().T}


SIZE = 4 * (4096 + 2048 + 1000)


@pytest.mark.parametrize(
    ("free", "staged", "waits"),
    [(10, 0, True), (int(1.2 * SIZE) + 1000, None, False), (100 + 4 * 5000, 4 * 4096, True)],
    ids=["no room", "room for all", "room for a part"],
)
def test_updates_right_after_a_snapshot_do_not_reach_it(play, free, staged, waits):
    gpu = play(free)
    host = gpu.host
    host._updates = 2  # as after two steps
    for save in range(3):
        tensors = {name: tensor + save for name, tensor in state().items()}
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        with gpu:
            copies = host.take(tensors)
            assert gpu.queue and not copies["weights/b"].equal(before["weights/b"])
            queued = list(gpu.queue)
            host.hold_updates()
            for tensor in tensors.values():
                tensor += 1000
            assert (gpu.queue != queued) == waits
            host.wait()
        for name, copy in copies.items():
            assert copy.equal(before[name]) and copy.dtype == before[name].dtype, name
        assert len(gpu.guarded) == (0 if staged == 0 else save + 1)
        assert staged is None or host.staged_bytes == staged
        gpu.queue.clear()


def test_without_the_wait_an_update_would_reach_what_was_not_copied_on_the_gpu(play):
    """The played streams do notice."""
    for free, damaged in ((10, {"weights/a", "weights/b"}), (100 + 4 * 5000, {"weights/b"}), (10**6, set())):
        gpu = play(free)
        host, tensors = gpu.host, state()
        host._updates = 2
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        with gpu:
            copies = host.take(tensors)
            for tensor in tensors.values():
                tensor += 1000
            host.wait()
        wrong = {name for name in ("weights/a", "weights/b") if not copies[name].equal(before[name])}
        assert wrong == damaged


def test_nothing_is_copied_on_the_gpu_before_a_step_has_shown_what_it_needs(play, caplog):
    caplog.set_level("INFO", "nanotrain")
    gpu = play(10**6)
    host = gpu.host

    def staged() -> bool:
        gpu.guarded.clear()
        host.take(state())
        host.wait()
        return bool(gpu.guarded)

    with gpu:
        assert not staged() and not caplog.records
        host.hold_updates()
        assert not staged()
        host.hold_updates()
        assert staged() and staged()
        assert len(caplog.records) == 1 and "copied on the GPU first" in caplog.text
        gpu.peak = 980_000  # a step that needed more than any before
        assert not staged() and not staged()
        assert len(caplog.records) == 2 and "0.0 GB of the state" in caplog.text
        host.max_staged_bytes = 4 * 4096
        assert staged() and gpu.guarded == [4 * 4096]


def test_memory_in_pieces_is_no_failure(play, monkeypatch):
    gpu = play(10**6)
    host, tensors = gpu.host, state()
    host._updates = 2
    empty = torch.empty

    def refuse(*args, **kwargs):
        if "device" in kwargs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    with gpu:
        copies = host.take(tensors)
        host.hold_updates()
        tensors["weights/a"] += 1
        host.wait()
    assert copies["weights/a"].equal(state()["weights/a"])
