"""How the launchers of several machines begin an attempt together, also when one of them was started again.

The first machine keeps a store at NANOTRAIN_RENDEZVOUS. It opens a round, the others join it, and when all are there it
names the port at which the ranks of this attempt meet. A launcher that comes late, or again, waits for the next round.
"""

import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from nanotrain.config.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_POLL_SECONDS = 0.2
_CONNECT_SECONDS = 3.0


class MachinesMissingError(Exception):
    """The machines did not come together in time; says which are missing."""


@dataclass(frozen=True)
class Nodes:
    """The machines of a run."""

    count: int = 1
    rank: int = 0
    endpoint: str = ""
    """host:port of the first machine; empty where there is only one."""
    run_id: str = "nanotrain"
    join_seconds: float = 600.0
    """Machines wait so long for each other."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the endpoint.

        Raises:
            UserError: it is not host:port.
        """
        host, _, port = self.endpoint.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(
                f"the environment variable NANOTRAIN_RENDEZVOUS ({self.endpoint!r}) must be host:port of the first"
                " machine; see launch/torchrun.sh."
            )
        return host, int(port)


class Meeting:
    """Rounds of one run, as this machine sees them."""

    def __init__(self, nodes: Nodes, stopped: Callable[[], bool]) -> None:
        """Prepare; nothing is connected yet.

        Args:
            nodes: several machines, and which of them this is.
            stopped: whether a signal asked to stop; ends the waiting.
        """
        self._nodes, self._stopped = nodes, stopped
        self._store: TCPStore | None = None
        self._last = ""
        """The round that this launcher has joined."""
        self._started = False
        """That round has begun."""

    def next_round(self) -> str | None:
        """Return host:port where the ranks of the next attempt meet; None = stopped while waiting.

        Raises:
            MachinesMissingError: after `join_seconds`.
        """
        return self._open_round() if self._nodes.rank == 0 else self._join_round()

    def _connect(self) -> "TCPStore":
        import torch.distributed as dist

        if self._store is None:
            host, port = self._nodes.address
            first = self._nodes.rank == 0
            self._store = dist.TCPStore(
                host, port, is_master=first, wait_for_workers=False, timeout=timedelta(seconds=_CONNECT_SECONDS)
            )
        return self._store

    def _key(self, *words: object) -> str:
        return "/".join([self._nodes.run_id, *(str(word) for word in words)])

    def _open_round(self) -> str | None:
        store, token = self._connect(), uuid.uuid4().hex
        store.set(self._key("round"), token)
        deadline = time.monotonic() + self._nodes.join_seconds
        missing = list(range(1, self._nodes.count))
        while missing:
            missing = [rank for rank in missing if not store.check([self._key(token, "joined", rank)])]
            if self._stopped():
                return None
            if missing and time.monotonic() > deadline:
                words = ", ".join(str(rank) for rank in missing)
                raise MachinesMissingError(
                    f"machine {words} of {self._nodes.count} (counted from 0) did not come within"
                    f" {self._nodes.join_seconds:.0f} s"
                )
            time.sleep(_POLL_SECONDS if missing else 0)
        host, _ = self._nodes.address
        port = _free_port()
        store.set(self._key(token, "start"), str(port))
        return f"{host}:{port}"

    def _join_round(self) -> str | None:
        import torch.distributed as dist

        deadline = time.monotonic() + self._nodes.join_seconds
        while time.monotonic() < deadline:
            if self._stopped():
                return None
            try:
                endpoint = self._try_to_join()
            except dist.DistError:  # the first machine is not there yet, or starts again
                self._store, endpoint = None, None
            if endpoint is not None:
                return endpoint
            time.sleep(_POLL_SECONDS)
        raise MachinesMissingError(
            f"the first machine ({self._nodes.endpoint}) began nothing within {self._nodes.join_seconds:.0f} s"
        )

    def _try_to_join(self) -> str | None:
        """Join the open round and return its endpoint when it starts; None = there is none yet."""
        store = self._connect()
        if not store.check([self._key("round")]):
            return None
        token = store.get(self._key("round")).decode()
        start = self._key(token, "start")
        if token != self._last:
            if store.check([start]):  # it began without this launcher: it will fail, and another round will open
                return None
            store.set(self._key(token, "joined", self._nodes.rank), "1")
            self._last, self._started = token, False
        if self._started or not store.check([start]):
            return None
        self._started = True
        return f"{self._nodes.address[0]}:{store.get(start).decode()}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
