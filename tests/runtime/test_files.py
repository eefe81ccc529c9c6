"""Atomic writes and digests: hashlib is the oracle, and a failure in the middle leaves what was there."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanotrain.runtime.files import (
    file_digest,
    folder_atomic,
    folder_digest,
    fsync_folder,
    remove_leftovers,
    write_bytes_atomic,
    write_json_atomic,
)


def test_bytes_and_json_are_written_whole_and_leave_nothing_beside(tmp_path):
    write_bytes_atomic(tmp_path / "deep" / "a.bin", b"one")
    write_bytes_atomic(tmp_path / "deep" / "a.bin", b"two")
    write_json_atomic(tmp_path / "b.json", {"z": 1, "a": [1.5]})
    fsync_folder(tmp_path)
    assert (tmp_path / "deep" / "a.bin").read_bytes() == b"two"
    assert (tmp_path / "b.json").read_text() == json.dumps({"a": [1.5], "z": 1}, indent=2) + "\n"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a.bin", "b.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(tmp_path / "b.json", math.nan)
    assert json.loads((tmp_path / "b.json").read_text()) == {"z": 1, "a": [1.5]}


def test_digests_are_sha256_of_content_and_of_names(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "x" / "f") == hashlib.sha256(b"abc").hexdigest()
    before = folder_digest(tmp_path)
    (tmp_path / "x" / "f").rename(tmp_path / "x" / "g")
    renamed = folder_digest(tmp_path)
    (tmp_path / "x" / "g").write_bytes(b"abd")
    assert len({before, renamed, folder_digest(tmp_path)}) == 3
    (tmp_path / "x" / "g").write_bytes(b"abc")
    assert folder_digest(tmp_path) == renamed


def test_a_folder_appears_whole_or_stays_as_it_was(tmp_path):
    target = tmp_path / "product"
    with folder_atomic(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "f").write_text("1")
        assert not target.exists()
    with pytest.raises(RuntimeError), folder_atomic(target) as temporary:
        (temporary / "f").write_text("2")
        raise RuntimeError
    assert (target / "sub" / "f").read_text() == "1" and not (target / "f").exists()
    with folder_atomic(target) as temporary:
        (temporary / "f").write_text("3")
    assert [p.name for p in tmp_path.iterdir()] == ["product"] and (target / "f").read_text() == "3"


@pytest.mark.parametrize("moment", range(4))
def test_killed_while_a_folder_is_replaced_one_whole_version_remains(tmp_path, moment):
    """os._exit at each rename of the replacement; `remove_leftovers` then restores or clears."""
    target = tmp_path / "product"
    target.mkdir()
    (target / "f").write_text("old")
    program = f"""
import os, sys
from pathlib import Path
from nanotrain.runtime.files import folder_atomic
real, calls = os.replace, [0]
def counted(*arguments):
    if calls[0] == {moment}:
        os._exit(9)
    calls[0] += 1
    real(*arguments)
    if calls[0] == {moment} + 1 and {moment} == 3:
        os._exit(9)
os.replace = counted
with folder_atomic(Path(sys.argv[1])) as temporary:
    (temporary / "f").write_text("new")
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program, str(target)], env=environment, check=False)
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["product"]
    assert (target / "f").read_text() == ("old" if moment < 2 else "new")
