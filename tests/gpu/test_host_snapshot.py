"""A snapshot is bit-equal to its moment while the very next steps change weights and states, by whichever way it goes."""

import copy
import gc

import pytest
import torch
from safetensors.torch import load_file

from nanotrain.checkpoint.host_snapshot import HostSnapshot
from nanotrain.checkpoint.row_shards import RowFiles
from nanotrain.config.engine import EngineConfig, Precision
from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype, TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.losses.language_modeling import CrossEntropy
from tests.conftest import random_batch
from tests.gpu.test_memory import PLAIN

GIB = 2**30
DEVICE = torch.device("cuda", 0)
WAYS = {"off": 0, "partial": 5 * GIB // 4, "on": 4 * GIB}


@pytest.fixture(autouse=True)
def own_memory():
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def large_state() -> dict[str, torch.Tensor]:
    """2 GiB in four tensors: the copy to the host takes some 50 ms, an update a fraction of one."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return {
        name: torch.randint(0, 2**30, (2**27,), dtype=torch.int32, device=DEVICE, generator=generator)
        for name in ("a", "b", "c", "d")
    }


@pytest.mark.parametrize("way", list(WAYS))
def test_updates_right_after_it_do_not_reach_a_snapshot(way):
    host, tensors = HostSnapshot(DEVICE), large_state()
    host.max_staged_bytes = WAYS[way]
    tensors["step"] = torch.tensor(7)  # as torch's AdamW keeps it
    for _ in range(3):
        before = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        allocated = torch.cuda.memory_allocated()
        copies = host.take(tensors)
        # The copy on the GPU is given back already: whoever gets its memory waits for the stream that reads it.
        assert torch.cuda.memory_allocated() == allocated == torch.cuda.max_memory_allocated()
        noise = [torch.full((2**27,), -1, dtype=torch.int32, device=DEVICE) for _ in range(6)]
        host.hold_updates()
        for tensor in tensors.values():
            tensor.add_(1)
        del noise
        host.wait()
        for name, copy_ in copies.items():
            assert copy_.equal(before[name]), name
    assert host.staged_bytes == {"off": 0, "partial": GIB, "on": 2 * GIB}[way]


def test_memory_that_would_run_out_is_taken_back_from_a_snapshot_under_way():
    """What is left is less than a step wants, as long as the copy on the GPU is not across: the allocator waits for it."""
    host, tensors = HostSnapshot(DEVICE), large_state()
    host.take(tensors)  # pins
    host.wait()
    host.max_staged_bytes = 4 * GIB
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2.5 * GIB) / total)
    try:
        before = {name: tensor.cpu() for name, tensor in tensors.items()}
        copies = host.take(tensors)
        assert host.staged_bytes == 2 * GIB
        wanted = torch.full((2 * GIB,), 255, dtype=torch.uint8, device=DEVICE)
        host.wait()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert int(wanted[-1]) == 255
    assert all(copies[name].equal(before[name]) for name in before)


def test_without_room_for_the_copy_the_snapshot_goes_directly():
    host, tensors = HostSnapshot(DEVICE), large_state()
    host.max_staged_bytes = 4 * GIB
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + GIB) / total)
    try:
        copies = host.take(tensors)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    host.wait()
    assert host.staged_bytes == 0
    assert all(copies[name].equal(tensors[name].cpu()) for name in tensors)


def test_the_peak_of_past_steps_decides(monkeypatch):
    """The GPU's free memory is made up: other processes share it, and filling it would end their tests."""
    host, tensors = HostSnapshot(DEVICE), large_state()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GIB, 4 * GIB))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        host.hold_updates()
    host.take(tensors)
    host.wait()
    assert host.staged_bytes == 2 * GIB
    gc.collect()
    torch.cuda.empty_cache()
    step = torch.empty(4 * GIB, dtype=torch.uint8, device=DEVICE)
    del step
    torch.cuda.empty_cache()
    host.take(tensors)
    host.wait()
    assert host.staged_bytes == 0 and host._step_peak >= 6 * GIB


@pytest.mark.parametrize("way", ["off", "partial", "on", "by itself"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_training_state_is_that_of_its_step(tiny_training_model, tmp_path, way, in_backward):
    optimizer = OptimizerConfig(
        parameter_dtype=ParameterDtype.bf16, state_dtype=StateDtype.int8, in_backward=in_backward, gradient_clip=0.0
    )
    training = TrainingConfig(
        steps=9, global_batch_size=2, micro_batch_size=2, sequence_length=12, learning_rate=1e-2, optimizer=optimizer
    )
    config = EngineConfig(precision=Precision.bf16, kernels=PLAIN)
    engine = build_engine(config, copy.deepcopy(tiny_training_model), training)
    size = sum(p.numel() * p.element_size() for p in engine._model.parameters())
    engine._host.max_staged_bytes = {"off": 0, "partial": size, "on": 2**30, "by itself": None}[way]
    for step in range(2):
        engine.train_step([random_batch(2, step)], CrossEntropy(), 1e-2)
    for step in range(2, 5):
        before = {name: parameter.detach().cpu().clone() for name, parameter in engine._model.named_parameters()}
        moments = {
            f"{name}/{field}": value.cpu().clone()
            for name, parameter in engine._model.named_parameters()
            for field, value in engine._optimizer.state[parameter].items()
        }
        write = engine.snapshot_state()
        assert (engine._host.staged_bytes > 0) == (way != "off")
        engine.train_step([random_batch(2, step)], CrossEntropy(), 1e-2)
        folder = tmp_path / str(step)
        folder.mkdir()
        write(folder)
        stored = RowFiles(folder.glob("tensors-*.safetensors"))
        for prefix, expected in (("weights/", before), ("optimizer/", moments)):
            for name, tensor in expected.items():
                read = torch.empty_like(tensor)
                stored.read_into(prefix + name, read)
                assert read.equal(tensor), name
        assert any(
            not parameter.detach().cpu().equal(before[name]) for name, parameter in engine._model.named_parameters()
        )
        assert load_file(folder / "random-00000.safetensors")
