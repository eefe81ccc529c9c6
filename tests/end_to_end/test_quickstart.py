"""The quickstart, shortened, on the real text: undisturbed, killed again and again, and run once more.

Slow: `bash launch/test.sh -m slow tests/end_to_end`. Needs the packages of the corpus, from the cache or by pip.
"""

import json
import random
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from nanotrain.checkpoint.hf_folder import load_model, load_state_dict
from tests.end_to_end.shortened import start, without_clocks

STAGES = ["prepare", "pretrain", "prune", "distill", "sft", "evaluate", "export"]
CHECKPOINTS = ["pretrain", "prune", "distill", "sft", "export"]


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calm") / "run"
    process = start(folder)
    _, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_leaves_its_product_and_the_report_is_whole(calm):
    report = json.loads((calm / "report.json").read_text())
    assert sorted(report["stages"]) == sorted(STAGES)
    assert report["total_seconds"] == pytest.approx(sum(report["stages"][name]["seconds"] for name in STAGES), abs=0.1)
    assert all(0 < report["stages"][name]["peak_memory_bytes"] < 4 * 2**30 for name in STAGES)
    assert (calm / "report.html").stat().st_size > 10_000
    for name in CHECKPOINTS:
        logits = load_model(calm / name / "hf", dtype=torch.float32)(torch.tensor([[5, 6, 7]]))
        assert logits.shape == (1, 3, 4096) and bool(torch.isfinite(logits).all())
    for name in ("pretrain", "distill", "sft"):
        steps = [json.loads(line) for line in (calm / name / "metrics.jsonl").read_text().splitlines()]
        assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_run_does_no_work(calm):
    before = {p: p.stat().st_mtime_ns for p in calm.rglob("*") if p.is_file() and p.name != ".lock"}
    process = start(calm)
    process.communicate()
    assert process.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in calm.rglob("*") if p.is_file() and p.name != ".lock"} == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_any_moment_it_ends_in_the_same_weights_and_the_same_report(calm, tmp_path):
    stormy = tmp_path / "run"
    chance, kills, stops = random.Random(7), 0, 0
    while True:
        process = start(stormy)
        try:
            _, err = process.communicate(timeout=5 + 8 * chance.random() + kills)
        except subprocess.TimeoutExpired:
            polite = kills % 4 == 3  # now and then the signal that a scheduler sends first
            process.send_signal(signal.SIGTERM if polite else signal.SIGKILL)
            _, err = process.communicate(timeout=60)
            stops += polite
            kills += 1
            assert process.returncode in ((75, 0) if polite else (-9, 0)), err[-3000:]
            assert kills < 60, "the run makes no progress between kills"
            continue
        assert process.returncode == 0, err[-3000:]
        break
    assert kills >= 2
    for name in CHECKPOINTS:
        one, other = load_state_dict(calm / name / "hf"), load_state_dict(stormy / name / "hf")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    reports = [without_clocks(json.loads((folder / "report.json").read_text())) for folder in (calm, stormy)]
    assert reports[0]["stages"].keys() == reports[1]["stages"].keys()
    for name in STAGES:
        assert reports[0]["stages"][name] == reports[1]["stages"][name], name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_damaged_product_is_named_and_nothing_is_overwritten(calm, tmp_path):
    victim = calm / "distill" / "hf" / "config.json"
    whole = victim.read_text()
    victim.write_text(whole[:-5])
    try:
        process = start(calm)
        _, err = process.communicate()
        assert process.returncode == 2 and "distill/hf/config.json was changed" in err
        assert victim.read_text() == whole[:-5]
    finally:
        victim.write_text(whole)
