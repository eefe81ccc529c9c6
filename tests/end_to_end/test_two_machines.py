"""launch/torchrun.sh on two machines, played by two launchers on this one that meet over localhost, two ranks in all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nanotrain.checkpoint.resume import find_defect, list_states
from nanotrain.runtime.files import file_digest
from tests.end_to_end.ranks_of_a_run import (
    RECIPE,
    ROOT,
    Ranks,
    free_port,
    make_wheels,
    short_settings,
    write_short_pipeline,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("machines")]
STEPS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "wheels").mkdir()
    arguments = ["run", write_short_pipeline(folder), *short_settings(2), f"output_dir='{folder / 'run'}'"]
    ranks = Ranks([*arguments, "--only", "prepare"], 1, make_wheels(folder / "wheels"), folder / "logs")
    try:
        assert ranks.wait(240) == [0], ranks.output[-3000:]
    finally:
        ranks.kill()
    return folder / "run/prepare/data"


class Machines:
    """Launchers of one run that share its folder."""

    def __init__(self, data: Path, folder: Path, join_seconds: int = 200) -> None:
        self.output, self._folder = folder / "run", folder
        own = [text.removeprefix("pretrain.") for text in short_settings(STEPS) if text.startswith("pretrain.")]
        own += ["engine=torch_cpu", "engine.threads=1", f"stage.data_from='{data}'", f"output_dir='{self.output}'"]
        self.arguments = [str(Path(RECIPE).with_name("pretrain.yaml")), *own]
        self._environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._environment |= {"NANOTRAIN_RENDEZVOUS": f"127.0.0.1:{free_port()}", "NANOTRAIN_RUN_ID": "played"}
        self._environment["NANOTRAIN_JOIN_SECONDS"] = str(join_seconds)
        self.launchers: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path] = []

    def start(self, rank: int, count: int = 2, ranks: int = 1) -> int:
        """Start a launcher and return its number."""
        number = len(self.launchers)
        self._logs.append(self._folder / f"machine-{rank}-{number}.log")
        environment = self._environment | {"NANOTRAIN_NODES": str(count), "NANOTRAIN_NODE_RANK": str(rank)}
        command = ["bash", str(ROOT / "launch/torchrun.sh"), "--ranks", str(ranks), "--restarts", "3", *self.arguments]
        with self._logs[-1].open("wb") as log:
            self.launchers.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
        return number

    def output_of(self, number: int) -> str:
        return self._logs[number].read_text(errors="replace")

    def ranks(self, number: int) -> list[psutil.Process]:
        children = psutil.Process(self.launchers[number].pid).children()
        return [child for child in children if "nanotrain" in child.cmdline()]

    def wait(self, number: int, seconds: float = 240) -> int:
        try:
            return self.launchers[number].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError("\n\n".join(map(self.output_of, range(len(self._logs))))[-6000:]) from None

    def wait_for_a_state(self) -> None:
        deadline = time.monotonic() + 200
        while not list_states(self.output / "pretrain/state"):
            assert time.monotonic() < deadline and all(one.poll() is None for one in self.launchers), self.output_of(0)
            time.sleep(0.02)
        assert not (self.output / "pretrain/stage.json").exists()

    def digests(self) -> dict[str, str]:
        return {file.name: file_digest(file) for file in (self.output / "pretrain/hf").glob("*.safetensors")}

    def end(self) -> None:
        for number, launcher in enumerate(self.launchers):
            if launcher.poll() is None:
                for rank in self.ranks(number):
                    rank.kill()
                launcher.kill()
                launcher.wait()


@pytest.fixture
def machines(data, tmp_path):
    started: list[Machines] = []

    def make(**settings) -> Machines:
        started.append(Machines(data, tmp_path, **settings))
        return started[-1]

    yield make
    for one in started:
        one.end()


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory) -> dict[str, str]:
    """Two ranks on one machine, undisturbed."""
    one = Machines(data, tmp_path_factory.mktemp("one"))
    try:
        assert one.wait(one.start(0, count=1, ranks=2)) == 0, one.output_of(0)
    finally:
        one.end()
    return one.digests()


def test_a_rank_killed_on_the_second_machine_restarts_both(machines, expected):
    two = machines()
    first, second = two.start(0), two.start(1)
    two.wait_for_a_state()
    two.ranks(second)[0].kill()
    killed = time.monotonic()
    while "starting again" not in two.output_of(first) or "starting again" not in two.output_of(second):
        assert time.monotonic() - killed < 60
        time.sleep(0.1)
    assert (two.wait(first), two.wait(second)) == (0, 0)
    assert two.digests() == expected and expected
    assert "rank 1 was killed by SIGKILL" in two.output_of(second)
    said = two.output_of(first) + two.output_of(second)
    assert said.count("pretrain: starting") == 1 == said.count("pretrain: resuming")
    assert "pretrain: resuming" in two.output_of(first)  # ranks are counted from the first machine
    assert all(find_defect(state) is None for _, state in list_states(two.output / "pretrain/state"))


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_launcher_takes_its_ranks_along_and_rejoins_when_it_is_started_again(machines, expected, victim):
    two = machines()
    for rank in (0, 1):
        two.start(rank)
    two.wait_for_a_state()
    orphan = two.ranks(victim)[0]
    two.launchers[victim].kill()
    two.launchers[victim].wait()
    orphan.wait(10)
    again = two.start(victim)
    assert (two.wait(1 - victim), two.wait(again)) == (0, 0)
    assert two.digests() == expected
    assert "starting again from the newest saved state (restart 1 of 3)" in two.output_of(1 - victim)


@pytest.mark.parametrize("victim", [1, 0])
def test_without_the_other_machine_a_launcher_ends_with_the_reason(machines, victim):
    two = machines(join_seconds=25)
    for rank in (0, 1):
        two.start(rank)
    two.wait_for_a_state()
    two.launchers[victim].kill()
    two.launchers[victim].wait()
    assert two.wait(1 - victim, 60) == 1
    reason = "machine 1 of 2 (counted from 0) did not come within 25 s" if victim else "began nothing within 25 s"
    assert reason in two.output_of(1 - victim) and "Traceback" not in two.output_of(1 - victim)[-1500:]
    assert list_states(two.output / "pretrain/state")


def test_a_mistake_is_said_once_and_a_signal_reaches_both_machines(machines):
    two = machines()
    right = list(two.arguments)
    two.arguments.append("stage.training.stepz=1")
    assert [two.wait(number) for number in (two.start(0), two.start(1))] == [2, 2]
    assert (two.output_of(0) + two.output_of(1)).count("is not a key of") == 1
    two.arguments = [*right, "stage.training.steps=100000"]
    first, second = two.start(0), two.start(1)
    two.launchers = two.launchers[first:]
    two._logs = two._logs[first:]
    two.wait_for_a_state()
    two.launchers[1].send_signal(signal.SIGUSR1)
    assert [two.wait(number) for number in (0, 1)] == [75, 75], second
    assert (two.output_of(0) + two.output_of(1)).count("saved at step") == 1
