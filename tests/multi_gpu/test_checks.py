"""The checks on several GPUs, rehearsed on CPU ranks through their launcher; what is done with ranks that end or hang."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.multi_gpu.agree import all_cases
from tests.multi_gpu.moves import cases_of
from tests.multi_gpu.shapes import CPU
from tests.multi_gpu.starts import Journal, Limits, Ranks, run_cases

ROOT = Path(__file__).parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore", "PYTHON": sys.executable}


def rehearse(folder: Path, *words: str) -> dict[str, dict[str, Any]]:
    """Return the rows of what the launcher ran on CPU ranks, by name; all of it must have passed."""
    command = ["bash", "launch/test_multi_gpu.sh", "--cpu", "--gpus", "2", "--out", str(folder), *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in lines]
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: row for row in rows}


def test_one_case_of_each_part_is_rehearsed(tmp_path):
    rows = rehearse(tmp_path, "--only", "torch ddp,fsdp2: saves", "agree", "faults")
    compared, saved = rows["torch ddp fp32"], rows["fsdp2: saves on 2"]
    assert compared["passed"] and len(compared["losses"]) == 5
    assert compared["losses"] == pytest.approx(rows["reference fp32 packed"]["losses"], rel=1e-5)
    # The same batches from the same weights: the steps after the save are the fourth and fifth.
    assert saved["losses"][:2] == pytest.approx(compared["losses"][3:], rel=1e-5)
    assert "needs 4 ranks" in rows["megatron pp4"]["left_out"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_engine_agrees_on_two_ranks(tmp_path):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    rows = rehearse(tmp_path, "agree")
    assert rows["reference fp32 packed"]["losses"] != rows["reference fp32 plain"]["losses"]
    assert {name for name, row in rows.items() if "passed" in row} == all_cases(CPU, 2)[0].keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_states_move_and_killed_runs_go_on(tmp_path):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    rows = rehearse(tmp_path, "faults")
    kills = {name for name in rows if name.startswith("kills: ")}
    assert rows.keys() - kills == cases_of(CPU, 2).keys() | {"fsdp2: loads on 1"} and len(kills) == 3
    assert rows["fsdp2: loads on 2"]["identical"] and rows["megatron fp32: loads at tp2"]["identical"]
    assert rows["kills: one of all"]["same_bytes"] and rows["save stall"]["whole"]


RANK = """
import argparse, os, sys, time
from pathlib import Path
from tests.multi_gpu.starts import Journal
parser = argparse.ArgumentParser()
parser.add_argument("--cases"), parser.add_argument("--journal", type=Path)
options = parser.parse_args()
journal = Journal(options.journal)
assert "missing" not in options.cases
for case in options.cases.split(","):
    if os.environ["RANK"] == "0":
        journal.begin(case)
    if case == "hangs":
        time.sleep(60)
    if case == "fails":
        journal.fail("what a rank failed by")
        time.sleep(0.5)
        sys.exit(1)
    if os.environ["RANK"] == "0":
        journal.finish(case, passed=case != "differs")
"""


@pytest.mark.slow
def test_a_case_that_ends_or_hangs_the_ranks_costs_no_other(tmp_path, monkeypatch):
    (tmp_path / "some_ranks.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    journal, out = Journal(tmp_path / "journal"), tmp_path / "out.jsonl"
    journal.folder.mkdir()
    ranks = Ranks("some_ranks", 2, ["--journal", str(journal.folder)])
    cases = ["first", "hangs", "second", "fails", "differs", "last"]
    assert not run_cases("part", ranks, cases, out, journal, Limits(total=150.0, case=8.0, first=60.0))
    assert journal.done == dict.fromkeys(cases, True) | dict.fromkeys(["hangs", "fails", "differs"], False)
    rows = {row["name"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert rows.keys() == {"hangs", "fails"} and "after 8 s" in rows["hangs"]["reason"]
    assert "exit code 1; what a rank failed by" in rows["fails"]["reason"]


@pytest.mark.slow
def test_ranks_that_do_not_come_up_are_started_twice(tmp_path, monkeypatch):
    (tmp_path / "some_ranks.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    journal, out = Journal(tmp_path / "journal"), tmp_path / "out.jsonl"
    journal.folder.mkdir()
    ranks = Ranks("some_ranks", 2, ["--journal", str(journal.folder)])
    assert not run_cases("part", ranks, ["missing", "other"], out, journal, Limits(total=150.0, case=60.0, first=60.0))
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["name"] for row in rows] == ["missing", "other"] and "did not come as far" in rows[1]["reason"]
