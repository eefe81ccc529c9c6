"""Trackers for real, without network: metrics.jsonl always, wandb offline, trackio in a local database."""

import json
import socket
import sqlite3

import pytest

from nanotrain.config.engine import TrackerKind, TrackingConfig
from nanotrain.runtime.tracking import build_tracker, truncate_metrics


@pytest.fixture
def no_network(monkeypatch):
    """Fail on any connection but those inside this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        assert local, f"a tracker tried to reach {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_file_survives_odd_numbers_and_is_cut_back(tmp_path):
    tracker = build_tracker(TrackingConfig(), tmp_path, "run", {})
    for step in (1, 2, 3):
        tracker.log(step, {"loss": float("nan") if step == 2 else 1.5, "mfu": None, "skipped": False})
    tracker.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert lines(tmp_path)[1]["loss"] is None
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    truncate_metrics(tmp_path, 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    tracker = build_tracker(TrackingConfig(), tmp_path, "run", {})
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_wandb_offline_writes_one_run_and_reaches_no_network(tmp_path, no_network, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    ids = []
    for step in (1, 2):
        tracker = build_tracker(TrackingConfig(kind=TrackerKind.wandb), tmp_path, "run", {"a": 1})
        tracker.log(step, {"loss": 1.0 / step})
        tracker.close()
        ids.append(json.loads((tmp_path / "tracker.json").read_text())["run_id"])
    assert ids[0] == ids[1]
    files = list(tmp_path.rglob(f"run-{ids[0]}.wandb"))
    assert files and all(file.stat().st_size > 0 for file in files)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_trackio_keeps_the_numbers_in_a_local_database(tmp_path, no_network, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio.utils

    for module in (trackio.utils,):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    tracker = build_tracker(TrackingConfig(kind=TrackerKind.trackio, project="p"), tmp_path, "run", {"a": 1})
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0 / step})
    tracker.close()
    databases = list((tmp_path / "trackio").rglob("*.db"))
    assert databases, "trackio wrote no database"
    rows = sqlite3.connect(databases[0]).execute("select step, metrics from metrics order by step").fetchall()
    assert [row[0] for row in rows] == [1, 2]
    assert "0.5" in str(rows[1][1]) or len(rows) == 2
