import pytest
import torch

from nanotrain.checkpoint.row_shards import RowFiles, Rows, whole, write_rows
from nanotrain.config.errors import UserError

MATRIX, SCALAR = torch.arange(35, dtype=torch.float32).reshape(7, 5), torch.tensor(3.0)


def write(folder, borders):
    for index, (low, high) in enumerate(zip(borders, borders[1:], strict=False)):
        rows = {"m": Rows(MATRIX[low:high].contiguous(), low, 7), "s": whole(SCALAR)}
        write_rows(folder / f"{index}.safetensors", rows)


@pytest.mark.parametrize("written", [[0, 7], [0, 4, 7], [0, 3, 6, 7, 7]])
@pytest.mark.parametrize("wanted", [[0, 7], [0, 4, 7], [0, 2, 4, 6, 7], [0, 7, 7]])
def test_any_division_reads_any_other(tmp_path, written, wanted):
    write(tmp_path, written)
    files = RowFiles(tmp_path.glob("*.safetensors"))
    assert files.shape("m") == (7, 5) and files.shape("s") == () and files.dtype("m") == torch.float32
    for low, high in zip(wanted, wanted[1:], strict=False):
        target = torch.full((high - low, 5), -1.0)
        files.read_into("m", target, low)
        assert target.equal(MATRIX[low:high])
    scalar = torch.zeros(())
    files.read_into("s", scalar)
    assert scalar == 3


def test_missing_rows_and_other_shapes_are_refused(tmp_path):
    write(tmp_path, [0, 3, 5, 7])
    (tmp_path / "1.safetensors").unlink()
    files = RowFiles(tmp_path.glob("*.safetensors"))
    files.read_into("m", torch.zeros(2, 5), 1)
    with pytest.raises(UserError, match="lacks 4 rows of 'm'"):
        files.read_into("m", torch.zeros(7, 5))
    with pytest.raises(UserError, match="another model"):
        files.read_into("m", torch.zeros(7, 4))
    with pytest.raises(UserError, match="no tensor 'x'"):
        files.read_into("x", torch.zeros(7, 4))
