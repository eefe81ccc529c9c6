"""Ranks: who they are, and that decisions are the same on all of them."""

import time
from datetime import timedelta

import pytest

from nanotrain.config.errors import UserError
from nanotrain.runtime import distributed
from nanotrain.runtime.distributed import (
    World,
    current_world,
    from_all,
    from_first,
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
