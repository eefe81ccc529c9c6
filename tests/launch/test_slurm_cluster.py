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
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"no SLURM cluster on this machine without {', '.join(MISSING)}"),
]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def call(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def job_state(environment: dict[str, str], number: str) -> dict[str, str]:
    shown = call(environment, "scontrol", "show", "job", number).split()
    return dict(word.split("=", 1) for word in shown if "=" in word)


def restart_now(environment: dict[str, str], number: str) -> None:
    """Cut short the two minutes for which SLURM holds a requeued job back.

    It holds it back because a node refuses a job's credential that is not younger than the job's end there, in whole
    seconds ("Job credential revoked"), and the job then counts as failed. So: the job has ended on every node (until
    then it is COMPLETING), and a new second has begun.
    """
    wait_for(lambda: job_state(environment, number)["JobState"] == "PENDING", "a job in the queue")
    ended = int(time.time())
    wait_for(lambda: int(time.time()) > ended, "a new second")
    call(environment, "scontrol", "update", f"JobId={number}", "StartTime=now")


def steps_done(run: Path) -> int:
    metrics = run / "pretrain/metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def test_a_pipeline_is_stopped_requeued_and_ends_in_the_undisturbed_weights(tmp_path, monkeypatch):
    wheels = make_wheels(tmp_path / "wheels")
    recipe = write_short_pipeline(tmp_path)
    settings = [*short_settings(STEPS), "cluster=cpu", "pretrain.cluster.nodes=2"]
    run, calm = tmp_path / "run", tmp_path / "calm"
    monkeypatch.setattr(corpus, "ensure_wheels", lambda packages, target: wheels)
    assert main(["run", recipe, "--only", "prepare", *settings, f"output_dir={run}"]) == 0
    undisturbed = Ranks(["run", recipe, *settings, f"output_dir={calm}"], 2, wheels, tmp_path / "logs")
    assert undisturbed.wait(240) == [0, 0], undisturbed.output

    python = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with one_machine_cluster() as cluster:
        environment = cluster | python
        submitted = call(
            environment, sys.executable, "-m", "nanotrain", "submit", recipe, *settings, f"output_dir={run}"
        )
        jobs = {entry: number for number, entry in (line.split() for line in submitted.splitlines())}
        assert list(jobs) == ["pretrain", "export"], "what is finished is not submitted"
        log = run / "slurm" / f"pretrain-{jobs['pretrain']}.log"
        try:
            wait_for(lambda: steps_done(run) > 10, "the first steps")
            call(environment, "scancel", "--signal=USR1", jobs["pretrain"])  # what comes ahead of the time limit
            wait_for(lambda: "goes back into the queue" in log.read_text(), "a saved state and the requeue")
            reached = steps_done(run)
            assert 10 < reached < STEPS
            restart_now(environment, jobs["pretrain"])
            wait_for(lambda: steps_done(run) > reached + 10, "steps after the requeue")
            call(environment, "scontrol", "requeue", jobs["pretrain"])  # a node that is taken away: no time to save
            restart_now(environment, jobs["pretrain"])
            wait_for(lambda: job_state(environment, jobs["export"])["JobState"] == "COMPLETED", "the end", 240)
        except BaseException:
            print(log.read_text() if log.exists() else "no log", submitted, call(environment, "squeue"))
            raise
        pretrained = job_state(environment, jobs["pretrain"])
        assert pretrained["JobState"] == "COMPLETED" and pretrained["Restarts"] == "2"
    for file in ("pretrain/hf/model.safetensors", "export/hf/model.safetensors"):
        assert file_digest(run / file) == file_digest(calm / file)
    assert (run / "report.html").exists()
