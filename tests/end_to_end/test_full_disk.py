"""A disk that is really full, or becomes read-only in mid-run: a small file system in memory is mounted as the run's folder.

Mounting needs root; without it the tests are skipped and say so.
"""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanotrain.checkpoint.resume import find_defect, list_states
from tests.end_to_end.ranks_of_a_run import (
    RECIPE,
    Ranks,
    make_wheels,
    short_settings,
    write_short_pipeline,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("disk")]
MIB = 2**20


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    return make_wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def data(wheels, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    arguments = ["run", write_short_pipeline(folder), *short_settings(2), f"output_dir='{folder / 'run'}'"]
    ranks = Ranks([*arguments, "--only", "prepare"], 1, wheels, folder / "logs")
    try:
        assert ranks.wait(240) == [0], ranks.output[-3000:]
    finally:
        ranks.kill()
    return folder / "run/prepare/data"


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs (root): {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_read_only(folder: Path) -> None:
    """Put a read-only view over the folder; a remount of the disk itself would wait for files that are open."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)


def make_writable(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Take the disk's room but for `leave` bytes."""
    file = folder / "somebody-elses"
    with file.open("wb") as handle:
        handle.write(bytes(max(0, shutil.disk_usage(folder).free - leave)))
    return file


class Training:
    """Pretraining on the small disk."""

    def __init__(self, data: Path, wheels: dict[str, Path], disk: Path, steps: int, *words: str, size: int = 1) -> None:
        self.output = disk / "run"
        own = [text.removeprefix("pretrain.") for text in short_settings(steps) if text.startswith("pretrain.")]
        recipe = str(Path(RECIPE).with_name("pretrain.yaml"))
        arguments = ["run", recipe, "engine=torch_cpu", "engine.threads=1", *own, f"stage.data_from='{data}'"]
        self.ranks = Ranks([*arguments, f"output_dir='{self.output}'", *words], size, wheels, disk.with_name("logs"))

    @property
    def states(self) -> list[tuple[int, Path]]:
        return list_states(self.output / "pretrain/state")

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline and not self.ranks.any_ended(), self.ranks.output[-3000:]
            time.sleep(0.02)

    def assert_states_are_whole(self) -> None:
        assert self.states and all(find_defect(state) is None for _, state in self.states)

    def said(self) -> list[str]:
        return [line for line in self.ranks.output.splitlines() if line.startswith("nanotrain: ")]


@pytest.fixture
def train(data, wheels, disk):
    started: list[Training] = []

    def start(steps: int, *words: str, size: int = 1) -> Training:
        started.append(Training(data, wheels, disk, steps, *words, size=size))
        return started[-1]

    yield start
    for one in started:
        one.ranks.kill()


@pytest.mark.parametrize("size", [1, 2])
def test_a_disk_that_fills_is_trained_through_and_saved_to_again(train, disk, size):
    run = train(100_000, size=size)
    run.wait_until(lambda: run.states)
    taken = fill(disk, 64 * 1024)
    run.wait_until(lambda: "could not be saved" in run.ranks.output)
    assert "No space left on device" in run.ranks.output and "training goes on" in run.ranks.output
    run.assert_states_are_whole()
    newest = run.states[-1][0]
    time.sleep(2)
    assert not run.ranks.any_ended()
    taken.unlink()
    run.wait_until(lambda: run.states and run.states[-1][0] > newest)
    run.ranks.signal(signal.SIGTERM)
    assert run.ranks.wait(60) == [75] * size, run.ranks.output[-3000:]
    run.assert_states_are_whole()
    assert not list((run.output / "pretrain/state").glob(".*"))


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_stop_ends_the_run_with_the_last_good_state(train, disk, how):
    run = train(100_000, "stage.training.on_save_failure=stop")
    run.wait_until(lambda: run.states)
    taken = fill(disk, 64 * 1024) if how == "full" else make_read_only(disk)
    assert run.ranks.wait(60) == [2], run.ranks.output[-3000:]
    assert len(run.said()) == 1, run.said()
    assert ("No space left" if how == "full" else "Read-only file system") in run.said()[0]
    run.assert_states_are_whole()
    newest = run.states[-1][0]
    taken.unlink() if taken else make_writable(disk)
    again = train(newest + 5, "stage.training.on_save_failure=stop", "--force")
    codes = again.ranks.wait(120)
    assert codes == [0], again.ranks.output[-3000:]


def test_a_disk_that_becomes_read_only_is_trained_through_and_saved_to_again(train, disk):
    run = train(100_000)
    run.wait_until(lambda: run.states)
    make_read_only(disk)
    run.wait_until(lambda: "could not be saved" in run.ranks.output)
    assert "Read-only file system" in run.ranks.output and "training goes on" in run.ranks.output
    run.assert_states_are_whole()
    newest = run.states[-1][0]
    make_writable(disk)
    run.wait_until(lambda: run.states and run.states[-1][0] > newest)
    run.ranks.signal(signal.SIGTERM)
    assert run.ranks.wait(60) == [75], run.ranks.output[-3000:]
    lines = (run.output / "pretrain/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))  # none was lost


def test_a_disk_that_is_full_at_the_end_keeps_the_last_state_for_the_same_command(train, disk):
    """The product has no room: the last state is there, and the same command finishes when there is room."""
    run = train(40)
    run.wait_until(lambda: run.states)
    taken = fill(disk, 64 * 1024)
    assert run.ranks.wait(120) == [2], run.ranks.output[-3000:]
    assert len(run.said()) == 1 and "No space left on device" in run.said()[0] and "make room" in run.said()[0].lower()
    run.assert_states_are_whole()
    assert not (run.output / "pretrain/stage.json").exists()
    taken.unlink()
    again = train(40)
    assert again.ranks.wait(120) == [0], again.ranks.output[-3000:]
    assert any((run.output / "pretrain/hf").iterdir())
