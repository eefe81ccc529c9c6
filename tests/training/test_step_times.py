"""The split of a step's time, against waits that are known; and the line that shows it."""

import json
import time
from dataclasses import replace

from tqdm import tqdm

from nanotrain.losses.distillation import ForwardKL
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.training.loop import train
from nanotrain.training.meter import BAR_FORMAT, describe
from nanotrain.training.teacher import TeacherLoader
from tests.training.test_loop import CONFIG, fresh_engine, run_in

WAIT = 0.15
LINE = {
    "loss": 12.345678, "grad_norm": 0.123456, "tokens_per_second": 123456.7, "mfu": 0.412, "memory_bytes": 71 << 30,
    "data_seconds": 0.01, "compute_seconds": 0.87, "communication_seconds": 0.12, "save_stall_seconds": 0.0,
    "eta_seconds": 86000.0,
}  # fmt: skip


class SlowLoader:
    def __init__(self, loader):
        self.loader = loader

    def microbatches(self, step):
        time.sleep(WAIT)
        return self.loader.microbatches(step)


class SlowTeacher:
    """An engine's part that an online teacher needs; sleeps, then gives the batches' own shape."""

    def __init__(self, engine):
        self.engine = engine

    def hidden_states(self, batches):
        time.sleep(2 * WAIT)
        return self.engine.hidden_states(batches)


def test_waits_are_found_where_they_were(tmp_path, random_loader):
    teacher = fresh_engine()
    loader = TeacherLoader(SlowLoader(random_loader), SlowTeacher(teacher))

    def evaluate():
        time.sleep(3 * WAIT)
        return {"held_out/loss": 1.0}

    config = replace(CONFIG, steps=4, evaluation_interval=2, save_interval_seconds=1e6)
    with teacher.head() as head:
        train(fresh_engine(config), loader, ForwardKL(head), config, run_in(tmp_path), evaluate)
    lines = [json.loads(line) for line in (tmp_path / "pretrain/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert WAIT <= line["data_seconds"] < 2 * WAIT  # the teacher's time is none of it
        assert line["compute_seconds"] >= 2 * WAIT
        assert line["communication_seconds"] is None
        assert ("evaluation_seconds" in line) == (line["step"] % 2 == 0)
        assert line.get("evaluation_seconds", 3 * WAIT) >= 3 * WAIT


def test_stalls_of_all_saves_since_the_last_line_are_added_up(tmp_path, random_loader, monkeypatch):
    engine = fresh_engine()
    snapshot = engine.snapshot_state

    def slow():
        time.sleep(WAIT)
        return snapshot()

    monkeypatch.setattr(engine, "snapshot_state", slow)
    config = replace(CONFIG, steps=4, evaluation_interval=0, keep_every=1, log_interval=4)
    train(engine, random_loader, CrossEntropy(), config, run_in(tmp_path))
    (line,) = [json.loads(line) for line in (tmp_path / "pretrain/metrics.jsonl").read_text().splitlines()]
    assert line["save_stall_seconds"] >= 3 * WAIT  # of steps 1 to 3; the last step's save comes after its line


def test_the_longest_line_fits_into_100_columns():
    shown = tqdm.format_meter(
        12000, 40000, 3600.0, ncols=100, prefix="pretrain", postfix=describe(LINE), bar_format=BAR_FORMAT
    )
    assert len(shown) <= 100
    assert "123k tok/s mfu 41% 71.0G data 1% comm 12% eta 23:53:20" in shown
    on_cpu = describe(LINE | {"mfu": None, "communication_seconds": None, "evaluation_seconds": 1.25})
    assert "mfu" not in on_cpu and "comm" not in on_cpu and "eval 1.2s" in on_cpu
