import contextlib
import errno
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.config.errors import UserError
from nanotrain.data import record_shards
from nanotrain.data.record_shards import text_bytes, write_shards
from nanotrain.runtime.files import folder_digest
from nanotrain.runtime.progress import Progress
from tests.data.sources import ListSource


def rows_of(count):
    return [{"text": f"text {n}", "id": n} for n in range(count)]


def write(folder, source, **options):
    return write_shards(folder / "out", "records", source, Progress(folder / "progress.jsonl"), "key", **options)


def read(folder):
    return [row for file in sorted((folder / "out").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@settings(max_examples=15, deadline=None)
@given(count=st.integers(0, 25), each=st.integers(1, 7), stops=st.lists(st.integers(0, 25), max_size=3))
def test_interrupted_runs_end_in_the_same_bytes(tmp_path_factory, count, each, stops):
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    done = write(whole, ListSource(rows_of(count)), rows_per_file=each)
    for stop in stops:
        with contextlib.suppress(KeyboardInterrupt):
            write(broken, ListSource(rows_of(count), stop), rows_per_file=each)
    again = write(broken, ListSource(rows_of(count)), rows_per_file=each)
    assert folder_digest(whole / "out") == folder_digest(broken / "out")
    assert (done.files, done.counts) == (again.files, again.counts)
    assert read(whole) == rows_of(count)
    assert done.counts["bytes"] == sum(len(row["text"]) for row in rows_of(count))


@pytest.mark.parametrize("most", [1, 4, 5, 9, 12])
def test_a_limit_stops_at_the_row(tmp_path, most):
    done = write(tmp_path, ListSource(rows_of(10)), rows_per_file=4, max_rows=most)
    assert read(tmp_path) == rows_of(min(most, 10)) and done.counts["rows"] == min(most, 10)
    assert write(tmp_path, ListSource(rows_of(10), 0), rows_per_file=4, max_rows=most).files == done.files


def test_a_damaged_file_is_written_again_and_a_finished_run_reads_nothing(tmp_path):
    write(tmp_path, ListSource(rows_of(10)), rows_per_file=4)
    before = folder_digest(tmp_path / "out")
    write(tmp_path, ListSource(rows_of(10), 0), rows_per_file=4)  # would fail at the first record
    (tmp_path / "out/records-00001.parquet").write_bytes(b"x")
    write(tmp_path, ListSource(rows_of(10)), rows_per_file=4)
    assert folder_digest(tmp_path / "out") == before


def test_a_full_disk_is_one_sentence_and_leaves_finished_files(tmp_path, monkeypatch):
    write(tmp_path, ListSource(rows_of(4)), rows_per_file=4, max_rows=4)
    before = folder_digest(tmp_path / "out")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_shards.pq, "write_table", full)
    with pytest.raises(UserError, match=r"records-00000.parquet` cannot be written .*No space left.*free some disk"):
        write_shards(tmp_path / "out2", "records", ListSource(rows_of(2)), Progress(tmp_path / "p2"), "key")
    assert folder_digest(tmp_path / "out") == before and not list(Path(tmp_path / "out2").iterdir())


def test_all_text_of_a_record_counts():
    assert text_bytes({"a": "ä", "b": [{"c": "xy", "d": 5}], "e": None}) == 4
