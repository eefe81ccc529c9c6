"""Copies of a training state in host memory, taken while the GPU goes on working.

The memory is allocated and pinned at the first snapshot and kept. Copies run on a stream of their own; what changes the
tensors afterwards waits on the GPU for them (`hold_updates`), so the Python thread never stands still.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_ALIGNMENT = 512
"""Bytes; of the start of every tensor in the arena."""


class HostSnapshot:
    """One snapshot at a time: whoever reads the last one must be through before the next is taken."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arena: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return contiguous copies in host memory, by name; on a GPU they are whole after `wait`.

        Args:
            tensors: on any device; the same shapes and dtypes as before let the memory be used again.
        """
        places, size = self._layout(tensors)
        arena = self._host_memory(size)
        copies = {
            name: arena[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            for (name, tensor), start in zip(tensors.items(), places, strict=True)
        }
        if self._device.type != "cuda":
            for name, tensor in tensors.items():
                copies[name].copy_(tensor)
            return copies
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                copies[name].copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)
        return copies

    def wait(self) -> None:
        """Return when the copies are whole; for the thread that writes them."""
        if self._copied is not None:
            self._copied.synchronize()

    def hold_updates(self) -> None:
        """Make what is queued on the GPU from now on wait for the copies; call it before weights or states change."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def _layout(self, tensors: Mapping[str, Tensor]) -> tuple[list[int], int]:
        """Return where each tensor starts, in bytes, and the size of the whole."""
        places, end = [], 0
        for tensor in tensors.values():
            places.append(end)
            bytes_ = tensor.numel() * tensor.element_size()
            end += -(-bytes_ // _ALIGNMENT) * _ALIGNMENT
        return places, end

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
