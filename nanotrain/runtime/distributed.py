"""The ranks of one run as torchrun starts them, and the few collectives that decide things.

Engines make the groups that carry tensors. Decisions (skip this entry, save now, stop) go over one gloo group with a
long timeout, because the other ranks may wait for hours while the first one prepares data.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from nanotrain.config.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

CONTROL_TIMEOUT = timedelta(days=14)
"""Of decisions; a rank that died is noticed at once, because its connection closes."""
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Of tensors; a rank that hangs ends the others after it."""


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the ranks of this machine."""
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what the ranks share."""
        return self.rank == 0


_control: "ProcessGroup | None" = None


def current_world() -> World:
    """Return the ranks that the launcher announced in the environment; one process where there was no launcher.

    Raises:
        UserError: a variable of torchrun is missing or is not a number.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return World()
    values = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = os.environ[name] if name in os.environ else ""
        if not text.isdecimal():
            raise UserError(
                f"the environment variable {name} ({text!r}) must be a whole number; start the ranks with"
                " launch/torchrun.sh or torchrun, or unset RANK and WORLD_SIZE for one process."
            )
        values.append(int(text))
    return World(*values)


def start_ranks(timeout: timedelta = COLLECTIVE_TIMEOUT) -> World:
    """Connect the ranks, once a process; nothing happens where there is only one.

    CUDA tensors go over NCCL; over gloo where several ranks share a GPU, which NCCL refuses.

    Args:
        timeout: of collectives over tensors.
    """
    global _control  # noqa: PLW0603 - one process belongs to one run
    world = current_world()
    if world.size == 1 or _control is not None:
        return world
    import torch
    import torch.distributed as dist

    backend = "gloo"
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(world.local_rank % gpus)
        if world.local_size <= gpus:
            backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timeout)
    _control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return world


def stop_ranks() -> None:
    """Disconnect, so that the process ends without waiting for others."""
    global _control  # noqa: PLW0603
    if _control is not None:
        import torch.distributed as dist

        _control = None
        dist.destroy_process_group()


def from_first(value: T) -> T:
    """Return the first rank's `value`, on every rank (any object that pickles)."""
    if _control is None:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def from_all(value: T) -> list[T]:
    """Return every rank's `value` in the order of ranks, on every rank."""
    if _control is None:
        return [value]
    import torch.distributed as dist

    values: list[T | None] = [None] * dist.get_world_size(_control)
    dist.all_gather_object(values, value, group=_control)
    return values  # type: ignore[return-value]  # all are filled


def on_any_rank(flag: bool) -> bool:
    """Return whether `flag` is set on some rank; the same answer everywhere."""
    return any(from_all(flag))


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if _control is not None:
        import torch.distributed as dist

        dist.barrier(group=_control)
