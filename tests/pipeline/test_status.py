from pathlib import Path

from nanotrain.pipeline import status as module
from nanotrain.pipeline.run import run_pipeline
from nanotrain.pipeline.status import State, assess
from tests.pipeline.fake_stages import FakeStages, build_report

FOLDER = Path("runs/toy/prepare")


def test_states_of_an_entry_without_inputs(load):
    entry = load("prepare").entries[0]
    assert assess(entry, FOLDER, {}).state is State.RUN
    run_pipeline(load("prepare"), FakeStages().table, report=build_report)
    assert assess(entry, FOLDER, {}).state is State.FINISHED
    other = assess(load("prepare", "seed=4").entries[0], FOLDER, {})
    assert other.state is State.STALE and "seed: 1 -> 4" in other.reason
    inputs = assess(entry, FOLDER, {"data_from": "digest"})
    assert inputs.state is State.STALE and "its input `data_from` has changed" in inputs.reason
    assert assess(entry, FOLDER, None).state is State.FINISHED  # an input still to be made is not compared


def test_another_package_version_is_named(load, monkeypatch):
    run_pipeline(load("prepare"), FakeStages().table, report=build_report)
    monkeypatch.setattr(module, "package_version", lambda: "99.0")
    status = assess(load("prepare").entries[0], FOLDER, {})
    assert status.state is State.STALE and "made it, and this is 99.0" in status.reason
