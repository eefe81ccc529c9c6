import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanotrain.checkpoint.tensor_files import (
    INDEX_FILE,
    SINGLE_FILE,
    open_tensors,
    plan_files,
    read_tensors,
    write_files,
    write_index,
    write_tensors,
)
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
    with pytest.raises(UserError, match=r"`w` is stored as F8_E4M3"):
        list(read_tensors(tmp_path))


@pytest.mark.parametrize("limit", [300, 10**9])
def test_parts_along_either_dimension(tmp_path: Path, limit: int) -> None:
    write_tensors(TENSORS.items(), {name: tensor.nbytes for name, tensor in TENSORS.items()}, tmp_path, limit)
    with open_tensors(tmp_path) as stored:
        assert stored.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
        rows = stored.read("t3", 0, [(8, 10), (0, 1), (4, 4)])
        assert torch.equal(rows, TENSORS["t3"][[8, 9, 0]])
        assert torch.equal(stored.read("t5", 1, [(1, 4)]), TENSORS["t5"][:, 1:4])
        assert torch.equal(stored.read_whole("t0"), TENSORS["t0"])


def test_several_writers_make_one_folder(tmp_path: Path) -> None:
    """Each writes the files of its own tensors; a writer's first tensor begins a file although the last has room."""
    sizes = {name: tensor.nbytes for name, tensor in TENSORS.items()}
    plan = plan_files(sizes, 300, starts=("t0", "t1", "t4"))
    assert list(plan.values()) == [["t0"], ["t1", "t2"], ["t3"], ["t4"], ["t5"]]
    for names in (["t4", "t5"], ["t1", "t2", "t3"], ["t0"]):
        write_files(plan, ((name, TENSORS[name]) for name in names), tmp_path)
    write_index(plan, sizes, tmp_path)
    assert same(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    with pytest.raises(AssertionError, match="not whole"):
        write_files(plan, [("t1", TENSORS["t1"])], tmp_path)
    with pytest.raises(AssertionError, match="out of order"):
        write_files(plan, [("t2", TENSORS["t2"]), ("t1", TENSORS["t1"])], tmp_path)
