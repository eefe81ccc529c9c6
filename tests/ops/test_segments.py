import torch

from nanotrain.ops.segments import segment_indices


def test_counts_changes_not_ids() -> None:
    ids = torch.tensor([[5, 5, 2, 2, 5, 9], [0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
    expected = [[0, 0, 1, 1, 2, 3], [0] * 6, [0, 1, 2, 3, 4, 5]]
    assert segment_indices(ids).tolist() == expected
    assert segment_indices(ids.to(torch.int16)).tolist() == expected


def test_one_position() -> None:
    assert segment_indices(torch.tensor([[7], [8]])).tolist() == [[0], [0]]
