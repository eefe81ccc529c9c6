"""Speed, utilisation, time left, and memory: pure functions, and the kernel's high-water mark."""

import resource
import sys
from pathlib import Path

PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
}
"""Dense bf16 tensor-core operations per second by part of the device's name (vendor's data sheets, without sparsity)."""


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Return the rate; 0 when no time has passed."""
    return tokens / seconds if seconds > 0 else 0.0


def mfu(flops: float, seconds: float, peak_flops_per_second: float | None) -> float | None:
    """Return model FLOPs utilisation in [0, 1]; None where the device's peak is not known.

    Args:
        flops: operations of forward and backward that the model needs, recomputation left out.
        seconds: wall clock.
        peak_flops_per_second: of all devices together.
    """
    if peak_flops_per_second is None or seconds <= 0:
        return None
    return flops / seconds / peak_flops_per_second


def eta_seconds(steps_done: int, steps_total: int, seconds: float) -> float:
    """Return the seconds that the remaining steps will take at the pace of `steps_done` steps in `seconds`."""
    return (steps_total - steps_done) * seconds / steps_done if steps_done else 0.0


def peak_flops_per_second(device_name: str) -> float | None:
    """Return the peak of a device by its name; None for a CPU or a device that is not in the table."""
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in device_name), None)


def device_name(device_type: str) -> str:
    """Return the name of the current device of this type, for `peak_flops_per_second`."""
    import torch

    return torch.cuda.get_device_name() if device_type == "cuda" else device_type


def reset_peak_memory() -> None:
    """Make the high-water mark of this process's memory start afresh.

    Where the kernel cannot (not Linux, or /proc is read-only) the mark covers the whole process: an upper bound.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Return the largest resident set of this process since the last reset."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes(device_type: str) -> int:
    """Return the memory that training takes: on a CPU the process's resident set, on a GPU the most allocated at once.

    The latter since the last save, whose copy of the state is no part of it (checkpoint/host_snapshot.py).
    """
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return peak_memory_bytes()
