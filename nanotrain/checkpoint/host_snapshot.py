"""Copies of a training state in host memory, taken while the GPU goes on working.

The host memory is allocated and pinned at the first snapshot and kept. Where the GPU has room beside a training step, the
state is copied on the GPU first, which takes milliseconds, and crosses to the host from there while training goes on. What
has no room crosses directly, and the next update waits on the GPU until it is across (`hold_updates`); the Python thread
never stands still.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

log = logging.getLogger("nanotrain")

_ALIGNMENT = 512
"""Bytes; of the start of every tensor in the arena."""
_MARGIN = 0.05
"""Of the GPU's memory: stays free for what is lost between blocks. A step of the 12B had 4% more reserved than allocated."""
_UPDATES_UNTIL_KNOWN = 2
"""The first step may still allocate optimizer states; the second one shows how much memory steps need."""


def staging_budget(available: int, step_peak: int) -> int:
    """Return how many bytes of a state may lie on the GPU twice while training goes on.

    Args:
        available: bytes that the allocator holds, used or not, and those that it could still get.
        step_peak: most bytes that were allocated at once so far, without copies of a state.
    """
    return max(0, int(available * (1 - _MARGIN)) - step_peak)


class HostSnapshot:
    """One snapshot at a time: whoever reads the last one must be through before the next is taken."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arena: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._direct_copied: torch.cuda.Event | None = None
        """What was read from the tensors themselves is across."""
        self._copied: torch.cuda.Event | None = None
        self._updates = 0
        self._step_peak = 0
        self._said: int | None = None
        self.max_staged_bytes: int | None = None
        """At most so much is copied on the GPU first; None = as much as there is room for. For tests and benchmarks."""
        self.staged_bytes = 0
        """So much of the last snapshot was."""

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return contiguous copies in host memory, by name; on a GPU they are whole after `wait`.

        Args:
            tensors: on any device; the same shapes and dtypes as before let the memory be used again.
        """
        places, size = _layout(tensors)
        arena = self._host_memory(size)
        copies = {name: _view(arena, start, tensors[name]) for name, start in places.items()}
        if self._device.type != "cuda":
            for name, tensor in tensors.items():
                copies[name].copy_(tensor)
            return copies
        # A few bytes that optimizers keep on the CPU; they are not behind any stream.
        for name in [name for name, tensor in tensors.items() if not tensor.is_cuda]:
            copies[name].copy_(tensors[name])
            del places[name]
        staged, staged_bytes = self._stage(tensors, places)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, start in places.items():
                if start >= staged_bytes:
                    copies[name].copy_(tensors[name], non_blocking=True)
            self._direct_copied = torch.cuda.Event()
            self._direct_copied.record(self._stream)
            if staged is not None:
                arena[:staged_bytes].copy_(staged, non_blocking=True)
                # The allocator gives this memory to nobody before the copy has read it; it waits for that itself
                # rather than report that memory has run out.
                staged.record_stream(self._stream)
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)
        del staged
        torch.cuda.reset_peak_memory_stats(self._device)  # what comes now is the steps' own, without the copy
        return copies

    def wait(self) -> None:
        """Return when the copies are whole; for the thread that writes them."""
        if self._copied is not None:
            self._copied.synchronize()

    def hold_updates(self) -> None:
        """Make what is queued on the GPU from now on wait for what is read from weights and states themselves.

        Call it in every step before they change.
        """
        self._updates += 1
        if self._direct_copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._direct_copied)

    def _stage(self, tensors: Mapping[str, Tensor], places: Mapping[str, int]) -> tuple[Tensor | None, int]:
        """Copy as much as has room on the GPU, from the front of the arena; return the copy [bytes] and its length."""
        ends = {name: start + _num_bytes(tensors[name]) for name, start in places.items()}
        size = max(ends.values(), default=0)
        budget = self._staging_budget()
        # All of a step's updates come after one point (`hold_updates`), so it does not matter which tensors these are.
        chosen = [name for name, end in ends.items() if end <= budget]
        staged, staged_bytes = None, max((ends[name] for name in chosen), default=0)
        if staged_bytes:
            try:
                staged = torch.empty(staged_bytes, dtype=torch.uint8, device=self._device)
            except torch.OutOfMemoryError:  # there is room, but in pieces
                staged_bytes = 0
        if staged is not None:
            for name in chosen:
                _view(staged, places[name], tensors[name]).copy_(tensors[name], non_blocking=True)
        self.staged_bytes = staged_bytes
        self._say(staged_bytes, size)
        return staged, staged_bytes

    def _staging_budget(self) -> int:
        self._step_peak = max(self._step_peak, torch.cuda.max_memory_allocated(self._device))
        if self.max_staged_bytes is not None:
            return self.max_staged_bytes
        if self._updates < _UPDATES_UNTIL_KNOWN:
            return 0
        available = torch.cuda.mem_get_info(self._device)[0] + torch.cuda.memory_reserved(self._device)
        return staging_budget(available, self._step_peak)

    def _say(self, staged_bytes: int, size: int) -> None:
        """Log which way saves go: once, and again when a larger or smaller part of the state has room."""
        if not size or self._updates < _UPDATES_UNTIL_KNOWN:
            return
        tenths = 10 * staged_bytes // size
        if tenths == self._said:
            return
        self._said = tenths
        if staged_bytes == size:
            way = f"the state ({size / 1e9:.1f} GB) is copied on the GPU first and goes to host memory beside training"
        else:
            way = (
                f"{staged_bytes / 1e9:.1f} GB of the state ({size / 1e9:.1f} GB) have room on the GPU beside a training"
                f" step ({self._step_peak / 1e9:.1f} GB); the next update waits until the rest is in host memory"
            )
        log.info("saves: %s", way)

    def _host_memory(self, size: int) -> Tensor:
        if self._arena is None or self._arena.numel() < size:
            self._free()
            self._arena = torch.empty(size, dtype=torch.uint8)
            if self._device.type == "cuda" and size:
                # Registered as it is: the allocator of pinned memory would round up to a power of two.
                result = torch.cuda.cudart().cudaHostRegister(self._arena.data_ptr(), size, 0)
                torch.cuda.check_error(int(result))
        return self._arena

    def _free(self) -> None:
        arena, self._arena = self._arena, None
        if arena is not None and self._device.type == "cuda" and arena.numel():
            self.wait()
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(arena.data_ptr())))

    def __del__(self) -> None:
        self._free()


def _layout(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """Return where each tensor starts, in bytes, and the size of the whole; those of the GPU lie in front."""
    places, end = {}, 0
    for name in sorted(tensors, key=lambda name: not tensors[name].is_cuda):
        places[name] = end
        end += -(-_num_bytes(tensors[name]) // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _view(arena: Tensor, start: int, tensor: Tensor) -> Tensor:
    """Return the bytes of `arena` from `start` on as a contiguous tensor of the dtype and shape of `tensor`."""
    return arena[start : start + _num_bytes(tensor)].view(tensor.dtype).view(tensor.shape)
