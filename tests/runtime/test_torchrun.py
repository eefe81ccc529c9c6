"""The launcher: the run's own exit code, restarts of what a restart can mend, signals that reach the ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanotrain.config.errors import UserError
from nanotrain.runtime.meeting import Nodes
from nanotrain.runtime.torchrun import read_nodes

ROOT = Path(__file__).parents[2]
# Stands for the package's command line.
RANK = """
import os, signal, sys, time
from pathlib import Path
folder, behaviour = Path(sys.argv[2]), sys.argv[3]
rank = os.environ["RANK"]
starts = len(list(folder.glob(f"{rank}-*")))
(folder / f"{rank}-{starts}").touch()
if behaviour == "signal":
    def save(number, frame):
        time.sleep(1)
        (folder / f"saved-{rank}-{number}").touch()
        sys.exit(75)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, save)
    (folder / f"ready-{rank}").touch()
    time.sleep(60)
if behaviour == "killed twice" and starts < 2 and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "killed twice" and starts < 2:
    time.sleep(60)
if behaviour == "killed once" and starts < 1:
    if rank == "1":
        while not (folder / "ready-0").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
    (folder / "ready-0").touch()
    time.sleep(60)
if behaviour == "mistake":
    sys.exit(2)
if behaviour == "defect":
    sys.exit(1)
"""

# The package's own command line, whose run ends while gloo's threads still hold the tensor of the last collective: they
# wait for the interpreter, and the interval (seconds) keeps the main thread from giving it away before its end.
BUSY_END = """
import sys, time
import torch
import torch.distributed as dist
from nanotrain import cli
from nanotrain.config.errors import UserError
from nanotrain.runtime import distributed
from nanotrain.runtime.signals import Terminated

def run(options):
    endings = {"done": None, "mistake": UserError("a mistake on purpose"), "stopped": Terminated()}
    distributed.wait_for_all()
    sys.setswitchinterval(1000)
    dist.all_reduce(torch.zeros(1), group=distributed._control._group, async_op=True)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        pass
    ending = endings[options.overrides[0]]
    if ending is not None:
        raise ending
    return 0

cli._run_recipes = run
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "stand_in.py").write_text(RANK)
    (tmp_path / "busy_end.py").write_text(BUSY_END)
    (tmp_path / "seen").mkdir()

    def start(behaviour: str, restarts: int = 3, module: str = "stand_in") -> subprocess.Popen[str]:
        code = (
            f"import sys; from nanotrain.runtime.torchrun import main; sys.exit(main(sys.argv[1:], module={module!r}))"
        )
        words = ["--ranks", "2", "--restarts", str(restarts), "--", "run", str(tmp_path / "seen"), behaviour]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        return subprocess.Popen(
            [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        )

    return start


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, err


def test_a_killed_rank_is_named_and_the_run_started_again(start, tmp_path):
    code, err = finish(start("killed twice"))
    assert code == 0, err
    assert err.count("rank 1 was killed by SIGKILL") == 2 and "restart 2 of 3" in err
    assert len(list((tmp_path / "seen").glob("1-*"))) == 3


def test_a_survivor_that_answers_the_agent_as_if_asked_to_stop_does_not_hide_the_kill(start, tmp_path):
    code, err = finish(start("killed once", restarts=1))
    assert code == 0, err
    assert "rank 1 was killed by SIGKILL" in err and "restart 1 of 1" in err


@pytest.mark.parametrize(("behaviour", "code", "starts"), [("mistake", 2, 1), ("defect", 1, 2)])
def test_exit_codes_are_the_runs_own(start, tmp_path, behaviour, code, starts):
    assert finish(start(behaviour, restarts=1))[0] == code
    # A rank may be ended before its program has begun.
    assert max(len(list((tmp_path / "seen").glob(f"{rank}-*"))) for rank in (0, 1)) == starts


@pytest.mark.parametrize(("behaviour", "code"), [("done", 0), ("mistake", 2), ("stopped", 75)])
def test_a_thread_of_gloo_that_still_holds_a_tensor_does_not_abort_a_rank_at_its_end(start, behaviour, code):
    ended, err = finish(start(behaviour, restarts=0, module="busy_end"))
    assert ended == code, err
    assert "terminate called" not in err and err.count("a mistake on purpose") == (behaviour == "mistake")


def test_a_signal_reaches_every_rank_and_is_not_a_failure(start, tmp_path):
    process = start("signal")
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "seen").glob("ready-*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 75
    saved = sorted(path.name for path in (tmp_path / "seen").glob("saved-*"))
    assert [name[:7] for name in saved] == ["saved-0", "saved-1"]
    assert len(list((tmp_path / "seen").glob("0-*"))) == 1


def test_machines_are_read_from_the_environment(monkeypatch):
    assert read_nodes() == Nodes()
    monkeypatch.setenv("NANOTRAIN_NODES", "2")
    with pytest.raises(UserError, match="NANOTRAIN_RENDEZVOUS"):
        read_nodes()
    monkeypatch.setenv("NANOTRAIN_RENDEZVOUS", "first:29500")
    monkeypatch.setenv("NANOTRAIN_NODE_RANK", "2")
    with pytest.raises(UserError, match=r"NANOTRAIN_NODE_RANK \(2\)"):
        read_nodes()
    monkeypatch.setenv("NANOTRAIN_NODE_RANK", "one")
    with pytest.raises(UserError, match="'one'"):
        read_nodes()
    monkeypatch.setenv("NANOTRAIN_NODE_RANK", "1")
    monkeypatch.setenv("NANOTRAIN_JOIN_SECONDS", "30")
    assert read_nodes() == Nodes(2, 1, "first:29500", "nanotrain", 30.0)
    monkeypatch.setenv("NANOTRAIN_RENDEZVOUS", "first")
    with pytest.raises(UserError, match=r"NANOTRAIN_RENDEZVOUS \('first'\) must be host:port"):
        read_nodes()
