"""Lets Megatron-Core run on CPU ranks: what it asks of `torch.cuda` lands on the CPU.

Megatron-Core allocates on the current CUDA device and synchronises its streams throughout, whatever device its tensors are on. Only
tests redirect that: patching torch for a whole process is nothing that a user's run should depend on.
"""

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_TYPED = ("FloatTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor", "IntTensor", "LongTensor", "ByteTensor")


class _Nothing:
    """A stream or an event: the CPU has run everything by the time a call returns."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        self.device = CPU
        self.cuda_stream = 0

    def __getattr__(self, name: str) -> Any:
        if name in ("wait_stream", "wait_event", "synchronize", "record", "wait"):
            return lambda *_args, **_options: None
        if name == "record_event":
            return lambda *_args: _Nothing()
        if name == "query":
            return lambda: True
        raise AttributeError(name)


class _OnCpu(TorchFunctionMode):
    """Creates on the CPU what is asked for on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cuda":
            kwargs["device"] = CPU
        return func(*args, **kwargs)


def install() -> None:
    """Redirect `torch.cuda` for the rest of this process, once, and let the engine run on the CPU."""
    from nanotrain.engines.megatron_engine import DEVICE_TYPES

    if "cpu" in DEVICE_TYPES:
        return
    assert not torch.cuda.is_available(), "on a GPU Megatron-Core needs no redirection"
    DEVICE_TYPES.add("cpu")
    cuda: Any = torch.cuda
    functions: dict[str, Any] = {
        "current_device": lambda: CPU,
        "set_device": lambda *_: None,
        "device_count": lambda: 1,
        "get_device_capability": lambda *_: (9, 0),
        "device": lambda *_: contextlib.nullcontext(),
        "stream": lambda *_: contextlib.nullcontext(),
        "current_stream": _Nothing,
        "default_stream": _Nothing,
        "Stream": _Nothing,
        "Event": _Nothing,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
    }
    for name, function in functions.items():
        setattr(cuda, name, function)
    cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: 0
    for name in _TYPED:
        setattr(cuda, name, getattr(torch, name))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    plain_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        name = plain_type(self, *args, **options)  # clipping asserts that gradients are torch.cuda.FloatTensor
        return name if args or options or "cuda" in name else name.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_  # type: ignore[method-assign]
    _OnCpu().__enter__()
