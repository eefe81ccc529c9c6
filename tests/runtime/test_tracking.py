"""Trackers for real, without network, read back from their own files after a kill and a resume."""

import json
import math
import sqlite3
import struct
from collections import defaultdict
from contextlib import closing

import pytest
import trackio
import trackio.sqlite_storage
import trackio.utils
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from nanotrain.config.engine import TrackerKind, TrackingConfig
from nanotrain.runtime.tracking import build_tracker, truncate_metrics

KILLED, SAVED, LAST = 7, 4, 9
"""A run is killed after step 7, goes on from the state of step 4, and ends with step 9."""


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(step: int, attempt: int) -> dict:
    return {
        "loss": 1.0 / step + attempt,
        "mfu": None,
        "grad_norm": float("nan"),
        "skipped": False,
        "held_out/loss": 2.0 * step,
    }


def known(line: dict) -> dict:
    """What a tracker holds of a line: no missing numbers, and no step."""
    return {name: float(value) for name, value in line.items() if value is not None and name != "step"}


def killed_and_resumed(kind: TrackerKind, folder, lost_from: int = LAST) -> None:
    """Log two attempts; the first one's tracker had not yet written the steps from `lost_from` on."""
    first = build_tracker(TrackingConfig(kind=kind, project="p"), folder, "run", {"a": 1})
    for step in range(1, KILLED + 1):
        if step == lost_from:
            first.close()
            first = build_tracker(TrackingConfig(), folder, "run", {})
        first.log(step, values(step, 0))
    first.close()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # cut off by the kill
    truncate_metrics(folder, SAVED)
    second = build_tracker(TrackingConfig(kind=kind, project="p"), folder, "run", {"a": 1}, SAVED)
    for step in range(SAVED + 1, LAST + 1):
        second.log(step, values(step, 1))
    second.close()
    assert [line["step"] for line in lines(folder)] == list(range(1, LAST + 1))


def test_metrics_file_survives_odd_numbers_and_is_cut_back(tmp_path):
    killed_and_resumed(TrackerKind.none, tmp_path)
    assert all(line["grad_norm"] is None for line in lines(tmp_path))
    assert [math.floor(line["loss"]) for line in lines(tmp_path)][1:] == [0] * 3 + [1] * 5


@pytest.mark.parametrize(("variable", "rank"), [("0", True), ("1", False)])
def test_only_the_first_rank_writes(tmp_path, monkeypatch, variable, rank):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, variable)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    tracker = build_tracker(TrackingConfig(kind=TrackerKind.tensorboard), tmp_path / "entry", "run", {})
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert (tmp_path / "entry").exists() == rank


def test_tensorboard_goes_on_in_the_same_folder_and_no_step_is_there_twice(tmp_path):
    killed_and_resumed(TrackerKind.tensorboard, tmp_path)
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = defaultdict(dict)
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert steps == list(range(1, LAST + 1)), name
        for event in events.Scalars(name):
            found[event.step][name] = event.value
    for line in lines(tmp_path):
        assert found[line["step"]] == pytest.approx(known(line), rel=1e-6)


def test_tensorboard_chosen_on_the_way_gets_the_steps_before(tmp_path):
    tracker = build_tracker(TrackingConfig(), tmp_path, "run", {})
    tracker.log(1, values(1, 0))
    tracker.close()
    tracker = build_tracker(TrackingConfig(kind=TrackerKind.tensorboard), tmp_path, "run", {}, 1)
    tracker.log(2, values(2, 0))
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def wandb_records(file):
    """Yield the protobuf records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def test_wandb_offline_goes_on_with_the_same_run(tmp_path):
    killed_and_resumed(TrackerKind.wandb, tmp_path)
    wandb.teardown()  # its service closes the file after the run is finished; this waits for it
    run_id = json.loads((tmp_path / "tracker.json").read_text())["run_id"]
    (file,) = tmp_path.rglob("*.wandb")
    assert file.name == f"run-{run_id}.wandb" and file.parent.name.startswith("offline-run-")
    found, ids = {}, set()
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "run":
            ids.add((record.run.run_id, record.run.display_name, record.run.project))
        if record.WhichOneof("record_type") == "history":
            row = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            step = row.pop("_step")
            assert step not in found
            found[step] = {name: float(value) for name, value in row.items() if not name.startswith("_")}
    assert ids == {(run_id, "run", "p")}
    assert found == {line["step"]: known(line) for line in lines(tmp_path)}


@pytest.mark.parametrize("lost_from", [LAST, 3])
def test_trackio_goes_on_with_the_same_run(tmp_path, monkeypatch, lost_from):
    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    killed_and_resumed(TrackerKind.trackio, tmp_path, lost_from)
    (file,) = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(file)) as database:
        rows = database.execute("select run_name, run_id, step, metrics from metrics order by step").fetchall()
    run_id = json.loads((tmp_path / "tracker.json").read_text())["run_id"]
    assert {row[0] for row in rows} == {f"run-{run_id}"} and len({row[1] for row in rows}) == 1
    expected = {line["step"]: known(line) for line in lines(tmp_path)}
    for step in range(SAVED + 1, min(KILLED + 1, lost_from)):
        expected[step] = known(values(step, 0))  # written, and it cannot be taken back
        del expected[step]["grad_norm"]  # was not a number
    assert [row[2] for row in rows] == list(range(1, LAST + 1))
    assert {row[2]: {name: float(value) for name, value in json.loads(row[3]).items()} for row in rows} == expected
