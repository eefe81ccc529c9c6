"""How long the replicas' ranks wait for each other in a step, measured without making them wait more.

Three places: the count of tokens before the step (on the host), the sum of losses after it, and the end of the backward
pass, where DDP's all-reduces have run beside it and only what is left of them costs time. DDP itself takes the times of
the last: CUDA events on a GPU, clocks on a CPU.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.parallel import DistributedDataParallel

_NANOSECONDS = 1e-9
_MILLISECONDS = 1e-3


class CollectiveWaits:
    """Adds up one rank's waits over a step; `replicas` = None measures nothing."""

    def __init__(self, replicas: DistributedDataParallel | None, device: torch.device) -> None:
        self._replicas, self._device = replicas, device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if replicas is not None:
            replicas._set_ddp_runtime_logging_sample_rate(1)  # else every hundredth step only

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Time a collective over host memory, which returns when it is done."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Time a collective over the device's memory; on a GPU it is queued, and so are the marks around it."""
        if self._replicas is None or self._device.type != "cuda":
            with self.on_host():
                yield
            return
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        yield
        after.record()
        self._events.append((before, after))

    def take(self) -> float | None:
        """Return the waits since the last call in seconds and start anew; None = not measured.

        The device must have come past the step's last collective: nothing is waited for here.
        """
        seconds = self._seconds + sum(a.elapsed_time(b) * _MILLISECONDS for a, b in self._events)
        self._seconds, self._events = 0.0, []
        backward = self._after_backward()
        return None if backward is None else seconds + backward

    def _after_backward(self) -> float | None:
        if self._replicas is None:
            return None
        self._replicas.logger.set_runtime_stats_and_log()  # else DDP does so in the next step's forward pass
        taken = self._replicas._get_ddp_logging_data()
        if "backward_comm_time" not in taken or "backward_compute_comm_overlap_time" not in taken:
            return None
        return (taken["backward_comm_time"] - taken["backward_compute_comm_overlap_time"]) * _NANOSECONDS
