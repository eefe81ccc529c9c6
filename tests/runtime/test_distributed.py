"""Ranks: who they are, and that decisions are the same on all of them."""

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanotrain.config.errors import UserError
from nanotrain.runtime import distributed
from nanotrain.runtime.distributed import (
    World,
    current_world,
    from_all,
    from_first,
    leave_ranks,
    on_any_rank,
    start_ranks,
    wait_for_all,
)
from tests.ranks import run_ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_without_a_launcher():
    assert start_ranks() == current_world() == World(0, 1, 0, 1)
    assert from_first(7) == 7
    assert from_all("a") == ["a"]
    assert on_any_rank(True)
    assert not on_any_rank(False)
    wait_for_all()


def test_world_is_read_from_the_launchers_environment(monkeypatch):
    for name, value in zip(VARIABLES, ("5", "8", "1", "4"), strict=True):
        monkeypatch.setenv(name, value)
    assert current_world() == World(5, 8, 1, 4)
    assert not current_world().is_first


@pytest.mark.parametrize("value", ["", "two", "-1"])
def test_a_broken_environment_is_named(monkeypatch, value):
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("LOCAL_RANK", value)
    with pytest.raises(UserError, match="LOCAL_RANK"):
        current_world()


def a_rank_lost_while_the_others_connect() -> str:
    """One rank never opens the channel, as if it had died on the way."""
    if current_world().rank == 2:
        wait_for_all()
        return "lost"
    with pytest.raises(RuntimeError) as caught:
        distributed.open_channel()
    return str(caught.value)


def late_on_a_channel() -> int:
    """A decision that takes longer than connecting may."""
    channel = distributed.open_channel()
    if current_world().is_first:
        time.sleep(3.5)
    return channel.from_first(current_world().rank)


def connections() -> tuple[int, str, float]:
    distributed._CONNECT_TIMEOUT = timedelta(seconds=3)
    late = late_on_a_channel()
    started = time.monotonic()
    said = a_rank_lost_while_the_others_connect()
    return late, said, time.monotonic() - started


def decisions():
    world = current_world()
    wait_for_all()
    return (
        from_first({"rank": world.rank}),
        from_all(world.rank * 10),
        on_any_rank(world.rank == 2),
        on_any_rank(False),
    )


def decide_and_connect():
    return decisions(), connections()


def test_decisions_are_the_same_on_every_rank_and_one_lost_while_the_others_connect_ends_them():
    for rank, (decided, (late, said, seconds)) in enumerate(run_ranks(decide_and_connect, 3)):
        assert decided == ({"rank": 0}, [0, 10, 20], True, False)
        assert late == 0, "a decision may take longer than connecting"
        assert said == "lost" if rank == 2 else "timeout" in said.lower()
        assert seconds < 20


def fail_on_the_second():
    assert current_world().is_first, "the second rank failed on purpose"


def test_a_failing_rank_is_reported_with_its_traceback():
    with pytest.raises(AssertionError, match="the second rank failed on purpose"):
        run_ranks(fail_on_the_second, 2)


def gloo_threads() -> int:
    return sum(path.read_text().strip() == "pt_gloo_runloop" for path in Path("/proc/self/task").glob("*/comm"))


def leave() -> tuple[int, int]:
    """Leave with channels open and replicas built; return the threads of gloo before and after."""
    channel = distributed.open_channel()
    channel.from_first("a decision of another thread")
    replicas = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    replicas(torch.ones(1, 2)).sum().backward()
    del channel, replicas
    wait_for_all()
    before = gloo_threads()
    leave_ranks()
    return before, gloo_threads()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads have names in Linux' /proc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a group of gloo and NCCL stays")
def test_no_thread_of_gloo_is_left_after_the_last_word():
    for before, after in run_ranks(leave, 2):
        assert before >= 3 and after == 0


def leave_amid_a_collective() -> tuple[float, bool]:
    """The second rank leaves in the midst of a collective that the first one has not come to."""
    distributed._LEAVE_SECONDS = 1.0
    wait_for_all()
    if current_world().is_first:
        time.sleep(6)
    else:
        dist.all_reduce(torch.zeros(1), group=distributed._control._group, async_op=True)
    started = time.monotonic()
    leave_ranks()
    return time.monotonic() - started, any(thread.name == "leave-ranks" for thread in threading.enumerate())


def test_leaving_does_not_wait_for_a_rank_that_is_missing():
    (_, first_waits), (seconds, second_waits) = run_ranks(leave_amid_a_collective, 2)
    assert seconds < 4 and second_waits and not first_waits
