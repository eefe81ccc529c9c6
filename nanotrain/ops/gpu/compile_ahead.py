"""Compiles the Triton kernels of some work side by side, without launching them: a thread a kernel, as many as cores."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from triton.runtime import _async_compile
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction


class _InEveryThread:
    """Stands in for Triton's context variable, which the autograd engine's thread would not see."""

    def __init__(self, mode: _async_compile.AsyncCompileMode) -> None:
        self._mode = mode

    def get(self) -> _async_compile.AsyncCompileMode:
        return self._mode


@contextmanager
def compiling_only() -> Iterator[None]:
    """Within, a launch of a Triton kernel queues its compilation and computes nothing; at the end all are compiled.

    A kernel whose variants have yet to be timed is left to its first real launch.
    """
    launch, tune_and_launch = JITFunction.run, Autotuner.run

    def queue(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        return launch(self, *args, grid=grid, warmup=True, **options)

    def queue_tuned(self: Autotuner, *args: Any, **options: Any) -> Any:
        if len(self.configs) > 1:
            self.best_config = self.configs[0]  # callers read its block sizes
            return None
        return tune_and_launch(self, *args, **options)

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        mode = _async_compile.AsyncCompileMode(executor)
        everywhere = patch.object(_async_compile, "active_mode", _InEveryThread(mode))
        with everywhere, patch.object(JITFunction, "run", queue), patch.object(Autotuner, "run", queue_tuned):
            yield
        for future, kernel in zip(mode.raw_futures, list(mode.future_kernels.values()), strict=True):
            future.result()
            kernel.result()
