"""A distributed checkpoint of torch is read as it was written, and a pickle in it that would run something is not."""

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nanotrain.checkpoint.pickled_names import plain_values, require_plain_metadata
from nanotrain.config.errors import UserError


class Evil:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self._mark}'",)


def state() -> dict[str, object]:
    return {"weight": torch.arange(6.0).bfloat16().view(2, 3), "settings": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}


@pytest.fixture
def saved(tmp_path) -> Path:
    dcp.save(state(), checkpoint_id=tmp_path / "state", no_dist=True)
    return tmp_path / "state"


def read(folder: Path) -> dict[str, object]:
    found = {"weight": torch.zeros(2, 3, dtype=torch.bfloat16), "settings": [{"lr": 0.0, "betas": (0.0, 0.0)}]}
    require_plain_metadata(folder)
    with plain_values(folder):
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found


def test_what_was_saved_is_read(saved):
    found, expected = read(saved), state()
    assert torch.equal(found["weight"], expected["weight"]) and found["settings"] == expected["settings"]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("dotted", [False, True])
def test_a_table_of_contents_that_names_more_is_refused(saved, tmp_path, dotted):
    mark = tmp_path / "ran"
    content = pickle.dumps(Evil(mark))
    if dotted:  # reaches a module by way of one that a table may name
        content = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93." + content
    (saved / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata` holds a pickle that names more.*system.*resume from a state"):
        read(saved)
    assert not mark.exists()


def test_a_value_that_names_more_is_refused(saved, tmp_path):
    mark, buffer = tmp_path / "ran", io.BytesIO()
    torch.save(Evil(mark), buffer)
    table = pickle.loads((saved / ".metadata").read_bytes())
    index, place = next((key, value) for key, value in table.storage_data.items() if key.fqn.startswith("settings"))
    file = saved / place.relative_path
    offset = file.stat().st_size
    with file.open("ab") as handle:
        handle.write(buffer.getvalue())
    table.storage_data[index] = replace(place, offset=offset, length=len(buffer.getvalue()))
    (saved / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(UserError, match=r"names more than a state does \(posix\.system\)"):
        read(saved)
    assert not mark.exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_other_failures_keep_their_words(saved):
    next(saved.glob("*.distcp")).unlink()
    with pytest.raises(BaseException, match=r"No such file") as caught:
        read(saved)
    assert not isinstance(caught.value, UserError)
