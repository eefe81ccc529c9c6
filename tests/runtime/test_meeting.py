"""Launchers of several machines begin together: late ones, and those started again, take part in the next round."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanotrain.runtime.meeting import MachinesMissingError, Meeting, Nodes


def nodes(rank: int, port: int, count: int = 2, seconds: float = 20.0) -> Nodes:
    return Nodes(count, rank, f"127.0.0.1:{port}", "test", seconds)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def never() -> bool:
    return False


def test_rounds_have_a_place_of_their_own_and_a_new_launcher_joins_the_next(port):
    first, second = Meeting(nodes(0, port), never), Meeting(nodes(1, port), never)
    with ThreadPoolExecutor() as pool:
        seen = []
        for _ in range(2):
            joining = pool.submit(second.next_round)  # comes first, and waits
            time.sleep(0.3)
            seen.append(first.next_round())
            assert joining.result() == seen[-1]
        again = Meeting(nodes(1, port), never)  # while the ranks of the second round still run
        joining = pool.submit(again.next_round)
        time.sleep(0.5)
        assert not joining.done()
        assert first.next_round() == joining.result()
        del first
        first = Meeting(nodes(0, port), never)  # started again, with a new store at the same port
        opening = pool.submit(first.next_round)
        assert again.next_round() == opening.result()
    assert len(set(seen)) == 2 and all(place.startswith("127.0.0.1:") for place in seen)


def test_who_does_not_come_is_named(port):
    with pytest.raises(MachinesMissingError, match=r"machine 1, 2 of 3 \(counted from 0\) did not come within 1 s"):
        Meeting(nodes(0, port, 3, 1.0), never).next_round()


def test_without_the_first_machine_the_others_say_so(port):
    with pytest.raises(MachinesMissingError, match=rf"the first machine \(127\.0\.0\.1:{port}\) began nothing"):
        Meeting(nodes(1, port, 2, 1.0), never).next_round()


def test_a_signal_ends_the_waiting(port):
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    assert Meeting(nodes(0, port), stop.is_set).next_round() is None
