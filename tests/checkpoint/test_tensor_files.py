import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanotrain.checkpoint.tensor_files import INDEX_FILE, SINGLE_FILE, read_tensors, write_tensors
from nanotrain.config.errors import MissingInputError, UserError

TENSORS = {f"t{i}": torch.randn(10, i + 1) for i in range(6)}


def write(folder: Path, limit: int) -> None:
    write_tensors(TENSORS.items(), {name: tensor.nbytes for name, tensor in TENSORS.items()}, folder, limit)


def same(folder: Path) -> bool:
    read = dict(read_tensors(folder))
    return read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("limit", [1, 100, 300, 10**9])
def test_round_trip_in_shards_of_any_size(tmp_path: Path, limit: int) -> None:
    write(tmp_path, limit)
    assert same(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    if limit == 10**9:
        assert [shard.name for shard in shards] == [SINGLE_FILE]
        return
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    sizes = {
        shard.name: sum(TENSORS[n].nbytes for n, s in index["weight_map"].items() if s == shard.name)
        for shard in shards
    }
    assert all(size <= limit or list(index["weight_map"].values()).count(name) == 1 for name, size in sizes.items())


def test_truncated_file(tmp_path: Path) -> None:
    write(tmp_path, 10**9)
    whole = (tmp_path / SINGLE_FILE).read_bytes()
    for size in (0, 4, 60, len(whole) - 8):
        (tmp_path / SINGLE_FILE).write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model\.safetensors is corrupt or cut off"):
            list(read_tensors(tmp_path))


def test_missing_and_disagreeing_files(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="holds no"):
        list(read_tensors(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MissingInputError, match="never loaded"):
        list(read_tensors(tmp_path))
    write(tmp_path, 300)
    shard = sorted(tmp_path.glob("model-*"))[0]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(MissingInputError, match=shard.name):
        list(read_tensors(tmp_path))
    shard.write_bytes(content)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["ghost"] = shard.name
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UserError, match="ghost"):
        list(read_tensors(tmp_path))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "x.bin"}}'],
)
def test_bad_index(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(UserError, match=INDEX_FILE):
        list(read_tensors(tmp_path))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3, dtype=torch.float8_e4m3fn)}, tmp_path / SINGLE_FILE)
    with pytest.raises(UserError, match=r"`w` is stored as torch\.float8"):
        list(read_tensors(tmp_path))
