"""Starts the ranks of a run on this machine with torch's own agent, and starts them again after a failure.

    python -m nanotrain.runtime.torchrun [--ranks N] [--restarts N] -- run RECIPE ...

The difference to plain torchrun: the exit code is the run's own (0, 2, 75, ...), signals go to the ranks and the agent
waits for their save as long as it takes, and only failures that a restart can mend are restarted. Several machines meet
through NANOTRAIN_NODES, NANOTRAIN_NODE_RANK, NANOTRAIN_RENDEZVOUS (host:port of the first) and NANOTRAIN_RUN_ID, and wait
for each other NANOTRAIN_JOIN_SECONDS (600), at the start and after a failure (runtime/meeting.py).
"""

import argparse
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

from nanotrain.config.errors import UserError
from nanotrain.runtime.meeting import MachinesMissingError, Meeting, Nodes
from nanotrain.runtime.signals import PREEMPTION_SIGNALS

EXIT_USER_ERROR, EXIT_PREEMPTED, EXIT_FAILED = 2, 75, 1
FINAL_CODES = (EXIT_USER_ERROR, EXIT_PREEMPTED)
"""A restart would end the same way, or was not wanted."""
_MODULE = "nanotrain"
_RESTART_PAUSE_SECONDS = 2.0


def read_nodes() -> Nodes:
    """Return what the environment says about the machines of this run; one machine where it says nothing.

    Raises:
        UserError: a variable is missing or is not a number.
    """
    texts = {name: os.environ[name] if name in os.environ else default for name, default in (
        ("NANOTRAIN_NODES", "1"), ("NANOTRAIN_NODE_RANK", "0"), ("NANOTRAIN_JOIN_SECONDS", "600"))}  # fmt: skip
    for name, text in texts.items():
        if not text.isdecimal():
            raise UserError(
                f"the environment variable {name} ({text!r}) must be a whole number; see launch/torchrun.sh."
            )
    count, rank = int(texts["NANOTRAIN_NODES"]), int(texts["NANOTRAIN_NODE_RANK"])
    endpoint = os.environ["NANOTRAIN_RENDEZVOUS"] if "NANOTRAIN_RENDEZVOUS" in os.environ else ""
    if count > 1 and not endpoint:
        raise UserError(
            f"the environment variable NANOTRAIN_RENDEZVOUS must name host:port of the first of the {count} machines"
            " (NANOTRAIN_NODES); see launch/torchrun.sh."
        )
    if not rank < max(count, 1):
        raise UserError(f"NANOTRAIN_NODE_RANK ({rank}) must be less than NANOTRAIN_NODES ({count}).")
    run_id = os.environ["NANOTRAIN_RUN_ID"] if "NANOTRAIN_RUN_ID" in os.environ else "nanotrain"
    nodes = Nodes(count, rank, endpoint if count > 1 else "", run_id, float(texts["NANOTRAIN_JOIN_SECONDS"]))
    if count > 1:
        _ = nodes.address
    return nodes


class Launcher:
    """Runs `nanotrain ARGUMENTS` (the command line of `module`) on `ranks` ranks of this machine."""

    def __init__(self, ranks: int, restarts: int, arguments: list[str], nodes: Nodes, module: str = _MODULE) -> None:
        self._ranks, self._restarts, self._nodes = ranks, restarts, nodes
        self._module, self._arguments = module, arguments
        self._signalled = False
        self._given_up = False
        self._meeting = Meeting(nodes, lambda: self._signalled) if nodes.count > 1 else None

    def run(self) -> int:
        """Return the exit code of the run."""
        # Ours, not the agent's: it would kill the ranks 30 s after a signal, in the middle of a save.
        previous = {number: signal.signal(number, self._forward) for number in PREEMPTION_SIGNALS}
        try:
            for attempt in range(self._restarts + 1):
                code = self._attempt(attempt)
                final = code == 0 or code in FINAL_CODES or self._signalled or self._given_up
                if final or attempt == self._restarts:
                    return code
                _say(f"starting again from the newest saved state (restart {attempt + 1} of {self._restarts}).")
                time.sleep(_RESTART_PAUSE_SECONDS)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        raise AssertionError("the last attempt returns")

    def _attempt(self, attempt: int) -> int:
        import torch.distributed as dist
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._ranks)))
        where: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
        if self._meeting is not None:
            try:
                endpoint = self._meeting.next_round()
            except MachinesMissingError as error:
                _say(f"{error}; is its launcher running, with the same NANOTRAIN_RENDEZVOUS and NANOTRAIN_RUN_ID?")
                self._given_up = True
                return EXIT_FAILED
            if endpoint is None:
                return EXIT_PREEMPTED
            # The order of machines, and so of ranks, is that of NANOTRAIN_NODE_RANK.
            configs = {"rank": self._nodes.rank, "timeout": int(self._nodes.join_seconds)}
            where = {"rdzv_backend": "static", "rdzv_endpoint": endpoint, "rdzv_configs": configs}
        config = LaunchConfig(
            min_nodes=self._nodes.count,
            max_nodes=self._nodes.count,
            nproc_per_node=self._ranks,
            run_id=f"{self._nodes.run_id}-{attempt}" if self._meeting is None else self._nodes.run_id,
            max_restarts=0,
            local_addr="127.0.0.1" if self._nodes.count == 1 else None,  # not every machine can look up its own name
            signals_to_handle="SIGHUP,SIGQUIT",
            **where,
        )
        rank = ("-u", "-m", "nanotrain.runtime.rank_process", str(os.getpid()), self._module)
        try:
            elastic_launch(config, sys.executable)(*rank, *self._arguments)
        except ChildFailedError as error:
            return self._explain(error.failures)
        except dist.DistError as error:  # another machine's launcher died while the ranks were being started
            if self._meeting is None:
                raise
            _say(f"the machines lost each other ({str(error).splitlines()[0]}).")
            return EXIT_FAILED
        return 0

    def _explain(self, failures: dict[int, Any]) -> int:
        """Say which rank ended the run and how; return the exit code."""
        rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
        codes = {failure.exitcode for failure in failures.values()}
        # The agent ends the others by a signal, which they may answer with the code of a run that was asked to stop.
        killed = first.exitcode < 0 and -first.exitcode not in PREEMPTION_SIGNALS and not self._signalled
        for code in () if killed else FINAL_CODES:
            if code in codes and all(other in (code, 1) or other < 0 for other in codes):
                return code
        if first.exitcode < 0:
            _say(f"rank {rank} was killed by {signal.Signals(-first.exitcode).name}; the others were ended.")
            return 128 - first.exitcode
        _say(f"rank {rank} ended with exit code {first.exitcode}; the others were ended.")
        return first.exitcode

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Hand a signal to the ranks, which save and end."""
        import psutil

        self._signalled = True
        for child in psutil.Process().children():
            if child.status() != psutil.STATUS_ZOMBIE and self._module in child.cmdline():
                child.send_signal(number)


def _say(sentence: str) -> None:
    sys.stderr.write(f"nanotrain: {sentence}\n")


def main(arguments: list[str] | None = None, *, module: str = _MODULE) -> int:
    """Start the ranks of `module` and return the run's exit code."""
    parser = argparse.ArgumentParser(prog="torchrun.sh", description=__doc__)
    parser.add_argument("--ranks", type=int, help="ranks on this machine (default: its GPUs, or 1)")
    parser.add_argument(
        "--restarts", type=int, default=3, help="after so many failures the run is given up (default: 3)"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of nanotrain: run RECIPE ...")
    options = parser.parse_args(arguments)
    words = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    ranks = _gpus() or 1 if options.ranks is None else options.ranks
    try:
        if ranks < 1 or options.restarts < 0:
            raise UserError(f"`--ranks` ({ranks}) must be at least 1 and `--restarts` ({options.restarts}) at least 0.")
        return Launcher(ranks, options.restarts, words, read_nodes(), module).run()
    except UserError as error:
        _say(str(error))
        return EXIT_USER_ERROR


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    sys.exit(main())
