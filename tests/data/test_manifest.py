import json
import os

import pytest

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data.manifest import DataFolder, write_manifest
from nanotrain.runtime.files import file_digest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "web").mkdir()
    for name in ("train.bin", "train.idx"):
        (tmp_path / "web" / name).write_bytes(name.encode() * 100)
    write_manifest(tmp_path, {"tokenizer_digest": "abc"}, ["web/train.bin", "web/train.idx"])
    return tmp_path


def test_checked_files_are_handed_out(folder):
    data = DataFolder(folder)
    assert data.shard("web", "train") == folder / "web/train"
    assert data.tokenizer_digest == "abc"
    assert data.manifest["files"]["web/train.bin"] == {
        "bytes": 900,
        "sha256": file_digest(folder / "web/train.bin"),
    }


def test_one_changed_byte_is_found_though_size_and_time_are_the_same(folder):
    file = folder / "web/train.bin"
    stat = file.stat()
    content = bytearray(file.read_bytes())
    content[450] ^= 1
    file.write_bytes(bytes(content))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match=r"web/train\.bin` does not match its sha256.*prepare stage again"):
        DataFolder(folder).shard("web", "train")


def test_a_file_changed_after_it_was_checked_is_found(folder):
    data = DataFolder(folder)
    data.file("web/train.bin")
    (folder / "web/train.bin").write_bytes(b"x" * 900)
    with pytest.raises(UserError, match="does not match"):
        data.file("web/train.bin")


def test_missing_and_unknown_files_are_named(folder):
    (folder / "web/train.idx").unlink()
    with pytest.raises(MissingInputError, match=r"train\.idx` is missing though the manifest lists it"):
        DataFolder(folder).shard("web", "train")
    with pytest.raises(UserError, match=r"math/train\.idx` is not listed"):
        DataFolder(folder).shard("math", "train")


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(MissingInputError, match=r"manifest\.json` is missing.*data_from"):
        DataFolder(tmp_path / "nowhere")
    for content in ("{", "[]", "{}", json.dumps({"format": 1})):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="is not a manifest"):
            DataFolder(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99, "files": {}}))
    with pytest.raises(UserError, match="format 99"):
        DataFolder(tmp_path)


def test_the_tokenizer_must_be_the_one_that_made_the_tokens(folder, tmp_path):
    data = DataFolder(folder)
    other = tmp_path / "other"
    with pytest.raises(MissingInputError, match=r"tokenizer\.json` is missing"):
        data.check_tokenizer(other)
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not the tokenizer of the data"):
        data.check_tokenizer(other)
    write_manifest(folder, {"tokenizer_digest": file_digest(other / "tokenizer.json")}, [])
    DataFolder(folder).check_tokenizer(other)
