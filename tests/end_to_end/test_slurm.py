"""The shortened quickstart as a chain of jobs on a real SLURM cluster of this machine: cancelled, signalled, through.

Opt-in, because it starts daemons as root: NANOTRAIN_TEST_SLURM=1. Prints the transcript that docs/slurm.md shows.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanotrain.checkpoint.resume import list_states
from tests.end_to_end.shortened import OVERRIDES, RECIPE, ROOT
from tests.end_to_end.slurm_cluster import SlurmCluster, what_is_missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STAGES = ["prepare", "pretrain", "prune", "distill", "sft", "evaluate", "export"]
STEPS = 150
WORDS = ["cluster.ranks_per_node=2", "cluster.time_minutes=30", f"pretrain.stage.training.steps={STEPS}"]
WORDS += [f"{entry}.stage.training.micro_batch_size=2" for entry in ("pretrain", "distill", "sft")]


class Terminal:
    """Runs commands and keeps what a person would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def run(self, command: str, *, show: str = "") -> str:
        done = subprocess.run(
            command,
            check=False,
            shell=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHON": sys.executable},
        )
        out = (done.stdout + done.stderr).rstrip()
        self.lines += [f"$ {show or command}", *out.splitlines()]
        assert done.returncode == 0, out
        return done.stdout

    def note(self, text: str) -> None:
        self.lines.append(f"# {text}")


def wait_until(condition, seconds: float, what: str, log) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: {log()}"
        time.sleep(0.1)


@pytest.mark.skipif("NANOTRAIN_TEST_SLURM" not in os.environ, reason="NANOTRAIN_TEST_SLURM=1 is not set")
@pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing() or "nothing")
def test_a_pipeline_is_submitted_cancelled_requeued_and_through(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output, terminal = tmp_path / "run", Terminal()
    overrides = " ".join(f"'{word}'" for word in [*OVERRIDES, *WORDS, f"output_dir={output}"])
    with SlurmCluster(tmp_path / "cluster") as cluster:
        printed = terminal.run(
            f"bash launch/slurm.sh {RECIPE} {overrides}",
            show=f"bash launch/slurm.sh {RECIPE} {' '.join(WORDS[:2])} ... output_dir=runs/slurm",
        )
        jobs = dict(line.split(": job ") for line in printed.splitlines())
        assert list(jobs) == STAGES

        def log() -> str:
            return "\n".join(
                file.read_text(errors="replace")[-1500:] for file in sorted((output / "slurm").glob("*.log"))
            )

        def saved(step: int) -> bool:
            states = list_states(output / "pretrain/state")
            return bool(states) and states[-1][0] >= step

        terminal.run("squeue -o '%.5i %.20j %.9T %.5M %.30R'")
        pretrain = jobs["pretrain"]
        wait_until(lambda: saved(1), 400, "pretrain did not begin", log)
        terminal.note(
            f"in the middle of pretrain (the newest state: {list_states(output / 'pretrain/state')[-1][1].name})"
        )
        terminal.run(f"scancel {pretrain}")
        assert cluster.wait_for(pretrain, "CANCELLED", "COMPLETED", seconds=90) == "CANCELLED"
        terminal.run("squeue -o '%.5i %.20j %.9T %.5M %.30R'")
        stopped = list_states(output / "pretrain/state")[-1][0]
        terminal.run(f"scontrol requeue {pretrain}")
        wait_until(lambda: saved(stopped + 1), 240, "pretrain was not continued", log)
        terminal.note(f"it went on from step {stopped}; now the signal that comes ahead of the time limit")
        terminal.run(f"scancel --signal=USR1 {pretrain}")
        wait_until(lambda: "Restarts=2" in cluster.command("scontrol", "show", "job", pretrain), 120, "no requeue", log)
        terminal.run(f"scontrol show job {pretrain} | grep -o 'JobState=[A-Z]*\\|Restarts=[0-9]*'")
        for name in STAGES:
            assert cluster.wait_for(jobs[name], "COMPLETED", "FAILED", seconds=500) == "COMPLETED", log()
        terminal.note("all jobs are through")
    losses = [json.loads(line)["step"] for line in (output / "pretrain/metrics.jsonl").read_text().splitlines()]
    assert losses == list(range(1, STEPS + 1))  # no step is missing, none came twice
    attempts = json.loads((output / "pretrain/attempts.json").read_text())["seconds"]
    assert len(attempts) == 3
    terminal.run(f"ls {output}", show="ls runs/slurm")
    pretrain_log = (output / f"slurm/pretrain-{jobs['pretrain']}.log").read_text()
    terminal.run(
        f"grep -h 'nanotrain: \\|resuming' {output}/slurm/pretrain-{pretrain}.log",
        show=f"grep 'nanotrain: \\|resuming' runs/slurm/slurm/pretrain-{pretrain}.log",
    )
    assert pretrain_log.count("saved at step") == 2
    with capsys.disabled():
        print("\n" + "\n".join(line.replace(str(output), "runs/slurm") for line in terminal.lines))
    assert Path(output / "report.html").is_file()
