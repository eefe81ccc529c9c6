"""The ranks of one run as torchrun starts them, and the few collectives that decide things.

Engines make the groups that carry tensors. Decisions (skip this entry, save now, stop) go over one gloo group with a
long timeout, because the other ranks may wait for hours while the first one prepares data.
"""

import gc
import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nanotrain.config.errors import UserError
from nanotrain.runtime.signals import Preempted, Terminated

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

CONTROL_TIMEOUT = timedelta(days=14)
"""Of decisions; a rank that died is noticed at once, because its connection closes."""
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Of tensors; a rank that hangs ends the others after it."""
_CONNECT_TIMEOUT, _CONNECT_TIMEOUT_PER_RANK = timedelta(seconds=30), timedelta(seconds=0.1)
"""Of making a group. A rank that dies meanwhile has no connection yet that could close, and no signal is answered."""
_LEAVE_SECONDS = 10.0
"""Gloo's threads end at once, unless one waits for a rank that has not come; well below the 30 s that SLURM grants between
SIGTERM and SIGKILL."""
_POLL_SECONDS = 0.02
"""Waiting for the first rank is done in Python, so that a signal is answered meanwhile."""


class OtherRankFailed(Exception):
    """The first rank failed with a defect, and shows it; this rank has nothing to add."""


class ToldMistake(UserError):
    """A mistake that the first rank has found and says."""


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


class Channel:
    """Decisions between the ranks by one thread of each; another thread opens its own, or messages would mix."""

    def __init__(self, group: "ProcessGroup | None") -> None:
        self._group = group

    def from_first(self, value: T) -> T:
        """Return the first rank's `value`, on every rank (any object that pickles)."""
        if self._group is None:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def from_all(self, value: T) -> list[T]:
        """Return every rank's `value` in the order of ranks, on every rank."""
        if self._group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Return flag by flag whether it is set on some rank: one reduction of a few bytes."""
        if self._group is None:
            return flags
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return tuple(bool(number) for number in numbers.tolist())

    def wait_for_first(self) -> None:
        """Return when the first rank has come here too; answers signals while it waits."""
        if self._group is None:
            return
        import torch
        import torch.distributed as dist

        work = dist.broadcast(torch.zeros(1, dtype=torch.uint8), src=0, group=self._group, async_op=True)
        assert work is not None
        while not work.is_completed():
            time.sleep(_POLL_SECONDS)
        work.wait()


_control = Channel(None)


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What a function did on the first rank."""

    value: T | None = None
    mistake: str | None = None
    """Of the user: a UserError's sentence."""
    stopped: bool = False
    failed: bool = False


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

    Args:
        timeout: of collectives over tensors.
    """
    global _control  # noqa: PLW0603 - one process belongs to one run
    world = current_world()
    if world.size == 1 or _control._group is not None:
        return world
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(world.local_rank % gpus)
    if not dist.is_initialized():
        import torch.distributed.nn.functional  # imported later, it holds the group for good, as a default argument

        dist.init_process_group(choose_backend(world), timeout=timeout)
    _control = open_channel()
    return world


def choose_backend(world: World) -> str:
    """Return what carries tensors: NCCL those on GPUs; gloo all others, and all where ranks share a GPU (NCCL refuses)."""
    import torch

    return "cpu:gloo,cuda:nccl" if world.local_size <= torch.cuda.device_count() else "gloo"


def open_channel() -> Channel:
    """Return a channel of its own for a thread; every rank opens it at the same place of its main thread.

    Raises:
        RuntimeError: a rank was lost while the others were connecting.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return Channel(None)
    wait_for_all()  # however late one comes; from here on they connect at once
    group = dist.new_group(backend="gloo", timeout=connect_timeout())
    dist.distributed_c10d._set_pg_timeout(CONTROL_TIMEOUT, group)
    return Channel(group)


def connect_timeout() -> timedelta:
    """Return how long ranks that have come to the same place may take to connect."""
    return _CONNECT_TIMEOUT + _CONNECT_TIMEOUT_PER_RANK * current_world().size


def stop_ranks() -> None:
    """Disconnect, so that the process ends without waiting for others."""
    global _control  # noqa: PLW0603
    if _control._group is not None:
        import torch.distributed as dist

        _control = Channel(None)
        dist.destroy_process_group()


def leave_ranks() -> None:
    """End gloo's threads; the last thing that a program does while the interpreter still runs.

    Such a thread drops the tensors of a collective when the caller may have gone on already, and needs the interpreter
    for that. An interpreter that is ending ends the thread instead, and inside a C++ destructor that aborts the process: a
    run that was through ended with 134 (SIGABRT). Taking a group down waits for its threads, if nothing else holds it: what
    torch keeps of FSDP2 does hold the group of its tensors, whose last collective is long over by then.

    Other groups than gloo's are left to the end of the process: taking NCCL's down may wait for the other ranks. Neither
    is a collective waited for that does not end because a rank is missing.
    """
    global _control  # noqa: PLW0603
    if _control._group is None:
        return
    _control = Channel(None)
    gc.collect()  # engines lie in cycles, and hold groups
    thread = threading.Thread(target=_take_down_gloo, name="leave-ranks", daemon=True)
    thread.start()
    thread.join(_LEAVE_SECONDS)


def _take_down_gloo() -> None:
    """Take down every group of gloo's alone, in a thread of its own, which may be given up."""
    import torch.distributed as dist

    if not dist.is_initialized():  # a library did it
        return
    if dist.get_backend() == "gloo":
        dist.destroy_process_group()
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        if dist.get_backend(group) == "gloo":
            dist.destroy_process_group(group)


def from_first(value: T) -> T:
    """Return the first rank's `value`, on every rank (any object that pickles)."""
    return _control.from_first(value)


def from_all(value: T) -> list[T]:
    """Return every rank's `value` in the order of ranks, on every rank."""
    return _control.from_all(value)


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Return flag by flag whether it is set on some rank; the same answer everywhere."""
    return _control.any_of(*flags)


def on_any_rank(flag: bool) -> bool:
    """Return whether `flag` is set on some rank; the same answer everywhere."""
    return _control.any_of(flag)[0]


def wait_for_all() -> None:
    """Return when every rank has come here."""
    _control.any_of(False)


def on_first(function: Callable[[], T]) -> T:
    """Call `function` on the first rank only and return its value, on every rank, however long it takes.

    Raises:
        UserError: the first rank raised one; on every rank.
        Terminated: the first rank was stopped by a signal; there its own exception, on the others this one.
        OtherRankFailed: on the other ranks, when the first one raised anything else.
    """
    if _control._group is None:
        return function()
    if current_world().is_first:
        outcome: _Outcome[T] = _Outcome(failed=True)
        try:
            outcome = _Outcome(function())
        except UserError as error:
            outcome = _Outcome(mistake=str(error))
            raise
        except (Preempted, Terminated, KeyboardInterrupt):
            outcome = _Outcome(stopped=True)
            raise
        finally:
            _control.wait_for_first()
            outcome = _control.from_first(outcome)
        return outcome.value  # type: ignore[return-value]  # None only where the function returned it
    _control.wait_for_first()
    told: _Outcome[T] = _control.from_first(_Outcome())
    if told.mistake is not None:
        raise ToldMistake(told.mistake)
    if told.stopped:
        raise Terminated
    if told.failed:
        raise OtherRankFailed
    return told.value  # type: ignore[return-value]


def is_first_to_say(sentence: str) -> bool:
    """Return True on the rank that asks first, so that what several ranks found out by themselves is said once."""
    if _control._group is None:
        return current_world().is_first
    from torch.distributed import distributed_c10d

    key = hashlib.sha256(sentence.encode()).hexdigest()
    try:
        return distributed_c10d._get_default_store().add(f"said/{key}", 1) == 1
    except RuntimeError:  # the rank that kept the store has gone: better twice than never
        return True
