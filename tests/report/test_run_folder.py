import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nanotrain.config.errors import UserError
from nanotrain.report.run_folder import read_run


def test_order_is_that_of_run_json_then_of_stages(make_run: Callable[..., Path]) -> None:
    folder = make_run([("z_first", "sft"), ("a_second", "pretrain")])
    assert [entry.name for entry in read_run(folder).entries] == ["z_first", "a_second"]
    (folder / "run.json").unlink()
    assert [entry.name for entry in read_run(folder).entries] == ["a_second", "z_first"]


def test_unfinished_entry_counts_its_attempts(make_run: Callable[..., Path]) -> None:
    folder = make_run([("pretrain", "pretrain")])
    (folder / "pretrain" / "stage.json").unlink()
    attempts = {"fingerprint": "f", "seconds": [2.5, 4.0], "peak_memory_bytes": 123}
    (folder / "pretrain" / "attempts.json").write_text(json.dumps(attempts))
    (entry,) = read_run(folder).entries
    assert (entry.seconds, entry.peak_memory_bytes, entry.is_finished) == (6.5, 123, False)
    assert entry.stage == "PretrainConfig"


def test_repeated_and_broken_lines_of_metrics(make_run: Callable[..., Path]) -> None:
    folder = make_run([("pretrain", "pretrain")])
    lines = [
        '{"step": 1, "loss": 3.0}',
        '{"step": 2, "loss": 2.5}',
        '{"st',
        '{"step": 2, "loss": 2.0, "x": 1}',
        '{"ste',
    ]
    (folder / "pretrain" / "metrics.jsonl").write_text("\n".join(lines))
    (entry,) = read_run(folder).entries
    assert entry.metrics == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "x": 1}]


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        read_run(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no entry"):
        read_run(tmp_path)


def test_damaged_files_are_named(make_run: Callable[..., Path]) -> None:
    folder = make_run([("sft", "sft")])
    (folder / "sft" / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"sft/results\.json is damaged"):
        read_run(folder)
