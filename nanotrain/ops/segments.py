"""Document borders in packed rows."""

import torch
from torch import Tensor


def segment_indices(segment_ids: Tensor) -> Tensor:
    """Number the documents of each row 0, 1, 2, ...; a new document begins wherever the id changes.

    Counting changes instead of comparing ids keeps two documents apart that happen to carry the same id.

    Args:
        segment_ids: [B, S], any integer type.

    Returns:
        [B, S] int32, non-decreasing along S.
    """
    changes = torch.zeros_like(segment_ids, dtype=torch.int32)
    changes[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return changes.cumsum(dim=1, dtype=torch.int32)
