"""A pipeline on a real SLURM cluster of two nodes, all on this machine: submitted, stopped, requeued, finished.

Needs slurmctld, slurmd and munged (Debian: slurm-wlm, munge) and root.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nanotrain.cli import main
from nanotrain.data import corpus
from nanotrain.runtime.files import file_digest
from tests.end_to_end.ranks_of_a_run import ROOT, Ranks, make_wheels, short_settings, write_short_pipeline
from tests.launch.one_machine import missing_programs, one_machine_cluster

MISSING = missing_programs()
STEPS = 300
ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "COMPLETED"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # two minutes on two idle cores
    pytest.mark.skipif(bool(MISSING), reason=f"no SLURM cluster on this machine without {', '.join(MISSING)}"),
]


def call(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def job_state(environment: dict[str, str], number: str) -> dict[str, str]:
    shown = call(environment, "scontrol", "show", "job", number).split()
    return dict(word.split("=", 1) for word in shown if "=" in word)


class Jobs:
    """The jobs of a pipeline by entry; waits last as long as they may still come to what is waited for."""

    def __init__(self, environment: dict[str, str], submitted: str) -> None:
        self._environment = environment
        self.numbers = {entry: number for number, entry in (line.split() for line in submitted.splitlines())}

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Return when `condition` holds; fail as soon as a job is lost. The test's own limit bounds the rest."""
        while not condition():
            states = {entry: job_state(self._environment, number) for entry, number in self.numbers.items()}
            lost = {entry: state for entry, state in states.items() if state["JobState"] not in ALIVE}
            assert not lost, f"{what}: {lost}"
            time.sleep(0.3)


def restart_now(environment: dict[str, str], jobs: Jobs, entry: str) -> None:
    """Cut short the two minutes for which SLURM holds a requeued job back.

    It holds it back because a node refuses a job's credential that is not younger than the job's end there, in whole
    seconds ("Job credential revoked"), and the job then counts as failed. So: the job has ended on every node (until
    then it is COMPLETING), and a new second has begun.
    """
    number = jobs.numbers[entry]
    jobs.wait_for(lambda: job_state(environment, number)["JobState"] == "PENDING", "a job in the queue")
    ended = int(time.time())
    jobs.wait_for(lambda: int(time.time()) > ended, "a new second")
    call(environment, "scontrol", "update", f"JobId={number}", "StartTime=now")


def steps_done(run: Path) -> int:
    metrics = run / "pretrain/metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def has_saved(log: Path) -> bool:
    text = log.read_text()
    assert "failed with exit code" not in text, text
    return "goes back into the queue" in text


def test_a_pipeline_is_stopped_requeued_and_ends_in_the_undisturbed_weights(tmp_path, monkeypatch):
    wheels = make_wheels(tmp_path / "wheels")
    recipe = write_short_pipeline(tmp_path)
    settings = [*short_settings(STEPS), "cluster=cpu", "pretrain.cluster.nodes=2"]
    run, calm = tmp_path / "run", tmp_path / "calm"
    monkeypatch.setattr(corpus, "ensure_wheels", lambda packages, target: wheels)
    assert main(["run", recipe, "--only", "prepare", *settings, f"output_dir={run}"]) == 0
    undisturbed = Ranks(["run", recipe, *settings, f"output_dir={calm}"], 2, wheels, tmp_path / "logs")
    assert undisturbed.wait(600) == [0, 0], undisturbed.output

    python = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with one_machine_cluster() as cluster:
        environment = cluster | python
        submitted = call(
            environment, sys.executable, "-m", "nanotrain", "submit", recipe, *settings, f"output_dir={run}"
        )
        jobs = Jobs(environment, submitted)
        assert list(jobs.numbers) == ["pretrain", "export"], "what is finished is not submitted"
        pretrain = jobs.numbers["pretrain"]
        log = run / "slurm" / f"pretrain-{pretrain}.log"
        try:
            jobs.wait_for(lambda: steps_done(run) > 10, "the first steps")
            call(environment, "scancel", "--signal=USR1", pretrain)  # what comes ahead of the time limit
            jobs.wait_for(lambda: has_saved(log), "a saved state and the requeue")
            reached = steps_done(run)
            assert 10 < reached < STEPS
            restart_now(environment, jobs, "pretrain")
            jobs.wait_for(lambda: steps_done(run) > reached + 10, "steps after the requeue")
            call(environment, "scontrol", "requeue", pretrain)  # a node that is taken away: no time to save
            restart_now(environment, jobs, "pretrain")
            jobs.wait_for(lambda: job_state(environment, jobs.numbers["export"])["JobState"] == "COMPLETED", "the end")
        except BaseException:
            print(log.read_text() if log.exists() else "no log", submitted, call(environment, "squeue"))
            raise
        pretrained = job_state(environment, pretrain)
        assert pretrained["JobState"] == "COMPLETED" and pretrained["Restarts"] == "2"
    for file in ("pretrain/hf/model.safetensors", "export/hf/model.safetensors"):
        assert file_digest(run / file) == file_digest(calm / file)
    assert (run / "report.html").exists()
