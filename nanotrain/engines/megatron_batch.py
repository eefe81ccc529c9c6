"""What one rank of Megatron-Core sees of a micro-batch: its positions under context parallelism, documents as one row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotrain.engines.megatron_documents import ChunkDocuments, chunk_documents
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch
from nanotrain.ops.segments import segment_indices


@dataclass(frozen=True)
class SequenceSplit:
    """How ranks share a sequence.

    Under context parallelism a rank holds chunks r and 2 CP - 1 - r of 2 CP equal ones, which balances causal attention
    (Transformer Engine expects it).
    """

    context_parallel: int = 1
    context_rank: int = 0
    sequence_parallel: int = 1
    """Ranks among which each of those parts is split again between the layers."""

    @property
    def multiple(self) -> int:
        """Lengths are filled up to a multiple of this."""
        return self.sequence_parallel * (2 * self.context_parallel if self.context_parallel > 1 else 1)

    def chunks(self, length: int) -> tuple[range, range]:
        """Return the positions of this rank in a sequence of `length`, under context parallelism."""
        size = length // (2 * self.context_parallel)
        first, second = self.context_rank, 2 * self.context_parallel - 1 - self.context_rank
        return range(first * size, (first + 1) * size), range(second * size, (second + 1) * size)

    def take(self, tensor: Tensor) -> Tensor:
        """Return this rank's positions [B, S / CP, ...] of [B, S, ...]."""
        if self.context_parallel == 1:
            return tensor
        return torch.cat([tensor[:, chunk.start : chunk.stop] for chunk in self.chunks(tensor.shape[1])], dim=1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return [B, S, ...] from what all ranks took, by rank."""
        halves = [part.chunk(2, dim=1) for part in parts]
        return torch.cat([*(half[0] for half in halves), *(half[1] for half in reversed(halves))], dim=1)


@dataclass(frozen=True)
class LocalBatch:
    """`batch` holds this rank's positions only, and no segment ids: documents are `cu_seqlens`.

    Attributes:
        batch: [B, S / CP]; packed [1, B x S / CP], filled up with positions without label.
        cu_seqlens: [documents + 1] int32, packed only: where documents of the whole row start, and the end.
        longest: tokens of the longest document.
        num_positions: of the whole row, filled up.
        chunks: packed under context parallelism only: the documents of this rank's two chunks.
    """

    batch: MicroBatch
    cu_seqlens: Tensor | None
    longest: int
    num_positions: int
    chunks: tuple[ChunkDocuments, ...] = ()

    def to(self, device: torch.device) -> "LocalBatch":
        """Return the batch on `device`."""
        borders = None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=True)
        chunks = tuple(chunk.to(device) for chunk in self.chunks)
        return LocalBatch(self.batch.to(device), borders, self.longest, self.num_positions, chunks)


def has_borders(batch: MicroBatch) -> bool:
    """Return whether some row holds more than one document."""
    ids = batch.segment_ids
    return ids is not None and bool((ids[:, 1:] != ids[:, :-1]).any())


def localize(batches: Sequence[MicroBatch], split: SequenceSplit) -> list[LocalBatch]:
    """Return this rank's form of micro-batches; where one of them is packed, all are, so that stages exchange one shape."""
    packed = any(has_borders(batch) for batch in batches)
    return [_localize(batch, split, packed) for batch in batches]


def _localize(batch: MicroBatch, split: SequenceSplit, packed: bool) -> LocalBatch:
    cu_seqlens, longest = None, 0
    ids, labels, teacher = batch.input_ids, batch.labels, batch.teacher_hidden_states
    if packed:
        cu_seqlens, longest = _documents(batch, split.multiple)
        ids, labels = ids.reshape(1, -1), labels.reshape(1, -1)
        teacher = None if teacher is None else teacher.reshape(1, -1, teacher.shape[-1])
    filling = -ids.shape[1] % split.multiple
    if filling:
        ids, labels = F.pad(ids, (0, filling)), F.pad(labels, (0, filling), value=IGNORE_INDEX)
        teacher = None if teacher is None else F.pad(teacher, (0, 0, 0, filling))
    length = ids.shape[1]
    teacher = None if teacher is None else split.take(teacher)
    chunks: tuple[ChunkDocuments, ...] = ()
    if cu_seqlens is not None and split.context_parallel > 1:
        chunks = tuple(chunk_documents(cu_seqlens, chunk) for chunk in split.chunks(length))
    local = MicroBatch(split.take(ids), split.take(labels), None, teacher)
    return LocalBatch(local, cu_seqlens, longest, length, chunks)


def _documents(batch: MicroBatch, multiple: int) -> tuple[Tensor, int]:
    """Return the borders of the documents of all rows in one row, and the longest document; filling is one of them."""
    rows, length = batch.input_ids.shape
    segment_ids = batch.segment_ids
    if segment_ids is None:
        segment_ids = torch.zeros_like(batch.input_ids, dtype=torch.int32)
    index = segment_indices(segment_ids)
    starts = torch.ones(rows, length, dtype=torch.bool, device=index.device)
    starts[:, 1:] = index[:, 1:] != index[:, :-1]
    total = rows * length
    edges = [*starts.flatten().nonzero().flatten().tolist(), total]
    if total % multiple:
        edges.append(total + -total % multiple)
    borders = torch.tensor(edges, dtype=torch.int32, device=index.device)
    return borders, int((borders[1:] - borders[:-1]).max())


def unpad(hidden_states: Tensor, batch: MicroBatch) -> Tensor:
    """Return [B, S, D] in the form of `batch` from whole rows as the model saw them."""
    rows, length = batch.input_ids.shape
    if hidden_states.shape[0] != rows:
        return hidden_states[:, : rows * length].reshape(rows, length, -1)
    return hidden_states[:, :length]
