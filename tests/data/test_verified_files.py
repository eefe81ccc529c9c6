import json
import os

import pytest

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data import verified_files
from nanotrain.data.verified_files import STAMP_FILE, known_digest, verify_file
from nanotrain.runtime.files import file_digest


@pytest.fixture(autouse=True)
def every_file_is_large(monkeypatch):
    monkeypatch.setattr(verified_files, "_STAMPED_BYTES", 1)


@pytest.fixture
def readings(monkeypatch) -> list:
    """Names of the files that are read in full; each call stands for a new process."""
    seen = []
    monkeypatch.setattr(verified_files, "file_digest", lambda file: seen.append(file.name) or file_digest(file))
    return seen


def in_a_new_process(file):
    verified_files._digest.cache_clear()
    return known_digest(file)


def test_a_large_file_is_read_once_a_version(tmp_path, readings):
    file = tmp_path / "x.bin"
    file.write_bytes(b"one")
    assert {in_a_new_process(file) for _ in range(3)} == {file_digest(file)}
    assert readings == ["x.bin"]
    file.write_bytes(b"two")
    assert in_a_new_process(file) == in_a_new_process(file) == file_digest(file)
    assert readings == ["x.bin"] * 2


def test_a_flipped_byte_is_found_though_size_and_time_are_set_back(tmp_path):
    file = tmp_path / "x.bin"
    file.write_bytes(b"abc")
    stat, digest = file.stat(), in_a_new_process(file)
    file.write_bytes(b"abd")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    verified_files._digest.cache_clear()
    with pytest.raises(UserError, match=r"x\.bin` does not match its sha256 in `m`.*do this"):
        verify_file(file, size=3, sha256=digest, manifest="m", remedy="do this")


@pytest.mark.parametrize("stamp", ["", "{", "[]", '{"x.bin": 3}', '{"x.bin": {"version": 1, "sha256": "a"}}'])
def test_a_damaged_stamp_costs_one_reading(tmp_path, readings, stamp):
    file = tmp_path / "x.bin"
    file.write_bytes(b"abc")
    (tmp_path / STAMP_FILE).write_text(stamp)
    assert in_a_new_process(file) == in_a_new_process(file) == file_digest(file)
    assert readings == ["x.bin"] and "x.bin" in json.loads((tmp_path / STAMP_FILE).read_text())


def test_a_folder_that_cannot_be_written_has_no_stamp(tmp_path, readings, monkeypatch):
    file = tmp_path / "x.bin"
    file.write_bytes(b"abc")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(verified_files, "write_json_atomic", refuse)
    assert in_a_new_process(file) == in_a_new_process(file) == file_digest(file)
    assert readings == ["x.bin"] * 2 and not (tmp_path / STAMP_FILE).exists()


def test_small_files_have_no_stamp(tmp_path, monkeypatch):
    monkeypatch.setattr(verified_files, "_STAMPED_BYTES", 4)
    (tmp_path / "x").write_bytes(b"abc")
    in_a_new_process(tmp_path / "x")
    assert not (tmp_path / STAMP_FILE).exists()
    with pytest.raises(MissingInputError, match="do this"):
        verify_file(tmp_path / "y", size=3, sha256="", manifest="m", remedy="do this")
