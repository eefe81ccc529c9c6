"""What a rank sees of a micro-batch, and that all ranks together see it whole."""

import pytest
import torch

from nanotrain.engines.megatron_batch import SequenceSplit, has_borders, localize, unpad
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch


def batch(length: int, segments: list[list[int]] | None = None) -> MicroBatch:
    ids = torch.arange(2 * length).reshape(2, length)
    return MicroBatch(ids, ids + 1, None if segments is None else torch.tensor(segments), ids[..., None].float())


@pytest.mark.parametrize("length", [16, 13])
def test_context_parallel_ranks_share_a_row(length):
    whole = batch(length)
    splits = [SequenceSplit(2, rank, 2) for rank in range(2)]
    parts = [localize([whole], split)[0] for split in splits]
    assert [part.batch.input_ids.shape[1] for part in parts] == [8, 8]
    if length == 16:  # chunks 0 and 3, 1 and 2
        assert parts[0].batch.input_ids[0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
        assert parts[1].batch.input_ids[0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    joined = splits[0].join([part.batch.teacher_hidden_states for part in parts])
    assert unpad(joined, whole).equal(whole.teacher_hidden_states)
    labels = splits[0].join([part.batch.labels for part in parts])
    assert labels[:, :length].equal(whole.labels) and (labels[:, length:] == IGNORE_INDEX).all()


def test_documents_become_one_row():
    # The second row begins with the number that the first one ended with; it is a new document all the same.
    packed = batch(5, [[0, 0, 1, 1, 1], [1, 1, 1, 1, 7]])
    (local,) = localize([packed], SequenceSplit(sequence_parallel=4))
    assert local.cu_seqlens.tolist() == [0, 2, 5, 9, 10, 12]  # the last two positions are filling
    assert (local.longest, local.num_positions) == (4, 12)
    assert local.batch.input_ids.tolist() == [[*range(10), 0, 0]]
    assert local.batch.labels[0, 10:].tolist() == [IGNORE_INDEX] * 2
    assert unpad(local.batch.teacher_hidden_states, packed).equal(packed.teacher_hidden_states)


def test_one_document_a_row_is_not_packed():
    alone = batch(4, [[3, 3, 3, 3], [4, 4, 4, 4]])
    assert not has_borders(alone)
    (local,) = localize([alone], SequenceSplit())
    assert local.cu_seqlens is None and local.batch.input_ids.equal(alone.input_ids)


def test_micro_batches_of_a_step_have_one_form():
    first, second = localize([batch(4), batch(4, [[0, 1, 1, 1], [0, 0, 0, 0]])], SequenceSplit())
    assert first.cu_seqlens.tolist() == [0, 4, 8] and second.cu_seqlens.tolist() == [0, 1, 4, 8]


def test_context_parallel_ranks_share_a_packed_row():
    # Two rows of 7 in one of 16 = 4 chunks of 4; the filling is the last document.
    packed = batch(7, [[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 2, 3, 3]])
    splits = [SequenceSplit(2, rank, 4) for rank in range(2)]
    first, second = (localize([packed], split)[0] for split in splits)
    assert first.cu_seqlens.tolist() == second.cu_seqlens.tolist() == [0, 3, 7, 12, 14, 16]
    assert first.num_positions == second.num_positions == 16
    assert first.batch.input_ids.tolist() == [[0, 1, 2, 3, 12, 13, 0, 0]]
    assert second.batch.input_ids.tolist() == [list(range(4, 12))]
    assert [(c.first_key, c.end) for c in first.chunks] == [(0, 4), (12, 16)]
    assert [(c.first_key, c.end) for c in second.chunks] == [(3, 8), (7, 12)]
    assert second.chunks[0].cu_seqlens_q.tolist() == [0, 3, 4]
    assert second.chunks[0].cu_seqlens_kv.tolist() == [0, 4, 5]
    joined = splits[0].join([part.batch.teacher_hidden_states for part in (first, second)])
    assert unpad(joined, packed).equal(packed.teacher_hidden_states)


def test_one_rank_has_no_chunks():
    (local,) = localize([batch(4, [[0, 1, 1, 1], [0, 0, 0, 0]])], SequenceSplit())
    assert local.chunks == ()
