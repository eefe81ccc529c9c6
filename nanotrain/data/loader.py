"""From prepared data to micro-batches, by index arithmetic: any step can be asked for, in any order, at the same cost.

The global sequence of samples depends on the seed and the recipe only. Step t takes samples t*G ... t*G + G - 1, whatever
the number of ranks and the micro-batch size; those only decide who reads which.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from nanotrain.config.data import PhaseConfig
from nanotrain.config.errors import UserError
from nanotrain.config.training import TrainingConfig
from nanotrain.data.blend import Curriculum
from nanotrain.data.manifest import DataFolder
from nanotrain.data.permutation import derive_key, permuted_index
from nanotrain.data.token_shards import TokenShard
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch

Sample = tuple[np.ndarray, np.ndarray, np.ndarray]
"""input_ids, labels, segment_ids, each [S]."""


class _Chunks:
    """A shard as overlapping windows of S + 1 tokens, the last of one being the first of the next."""

    def __init__(self, shard: TokenShard, sequence_length: int) -> None:
        self._shard, self._length = shard, sequence_length
        self.num_whole = max(shard.num_tokens - 1, 0) // sequence_length

    def sample(self, number: int) -> Sample:
        """Return window `number`; one that reaches past the end is padded with ignored labels."""
        start = number * self._length
        stop = min(start + self._length + 1, self._shard.num_tokens)
        tokens = self._shard.tokens(start, stop).astype(np.int64)
        documents = self._shard.document_of(start, stop)
        labels = np.where(documents[1:] == documents[:-1], tokens[1:], IGNORE_INDEX)
        inputs, segments = tokens[:-1], (documents[:-1] - documents[0]).astype(np.int32)
        missing = self._length - len(inputs)
        if missing:
            inputs = np.pad(inputs, (0, missing))
            labels = np.pad(labels, (0, missing), constant_values=IGNORE_INDEX)
            segments = np.pad(segments, (0, missing), constant_values=segments[-1] + 1)
        return inputs, labels, segments


class GlobalBatches:
    """Deals the samples of a step out to ranks and micro-batches."""

    def __init__(self, training: TrainingConfig, dp_rank: int, dp_size: int) -> None:
        training.validate_batch("stage.training", dp_size)
        assert 0 <= dp_rank < dp_size
        self._training, self._dp_rank, self._dp_size = training, dp_rank, dp_size

    def sample(self, k: int) -> Sample:
        raise NotImplementedError

    def microbatches(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of optimizer step `step` (from 0)."""
        assert 0 <= step < self._training.steps, step
        per_rank = self._training.global_batch_size // self._dp_size
        first = step * self._training.global_batch_size + self._dp_rank * per_rank
        size = self._training.micro_batch_size
        return [
            stack_samples([self.sample(k) for k in range(start, start + size)])
            for start in range(first, first + per_rank, size)
        ]


def stack_samples(samples: list[Sample]) -> MicroBatch:
    """Return one micro-batch of equally long samples."""
    inputs, labels, segments = (torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))
    return MicroBatch(inputs, labels, segments)


class PretrainLoader(GlobalBatches):
    """Concat-and-chunk over a curriculum of blends.

    Args:
        data_folder: product of the prepare stage; every shard that is read is checked against its manifest first.
        curriculum: phases by share of the stage's samples.
        training: steps, batch sizes, sequence length.
        seed: of the run; orders the chunks of each source anew in every epoch.
        dp_rank: this rank.
        dp_size: number of ranks.

    Raises:
        UserError: a source is missing, damaged, or shorter than one sequence.
    """

    def __init__(
        self,
        data_folder: Path,
        curriculum: list[PhaseConfig],
        training: TrainingConfig,
        seed: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        super().__init__(training, dp_rank, dp_size)
        folder = DataFolder(data_folder)
        self._seed = seed
        self._curriculum = Curriculum(curriculum, training.steps * training.global_batch_size)
        self._chunks: dict[str, _Chunks] = {}
        self.num_tokens_available: dict[str, int] = {}
        """Training tokens of each source that the curriculum draws from."""
        for source, count in self._curriculum.totals.items():
            if not count:
                continue
            shard = TokenShard(folder.shard(source, "train"))
            self._chunks[source] = _Chunks(shard, training.sequence_length)
            self.num_tokens_available[source] = shard.num_tokens
            if not self._chunks[source].num_whole:
                raise UserError(
                    f"`{data_folder}/{source}/train.bin` holds {shard.num_tokens} tokens, fewer than one sequence of"
                    f" `stage.training.sequence_length` ({training.sequence_length}) + 1; shorten it or prepare more text."
                )

    def sample(self, k: int) -> Sample:
        """Return global sample k."""
        source, number = self._curriculum.draw(k)
        chunks = self._chunks[source]
        epoch, position = divmod(number, chunks.num_whole)
        key = derive_key("chunks", self._seed, source, epoch)
        return chunks.sample(permuted_index(position, chunks.num_whole, key))

    def plan(self) -> dict[str, dict[str, float]]:
        """Return for each source its samples over the whole stage, their share, and how often its text is read."""
        total = self._curriculum.num_samples
        return {
            source: {"samples": count, "share": count / total, "epochs": count / self._chunks[source].num_whole}
            for source, count in self._curriculum.totals.items()
            if count
        }


def validation_batches(
    data_folder: Path, category: str, *, sequence_length: int, micro_batch_size: int, max_tokens: int = 0
) -> Iterator[MicroBatch]:
    """Yield the held-out text of one category in order, documents packed, labels at their borders ignored.

    Args:
        data_folder: product of the prepare stage.
        category: one of `config.data.CATEGORIES`.
        sequence_length: tokens per row; the last row is padded.
        micro_batch_size: rows per batch; the last batch may be smaller.
        max_tokens: 0 = all; otherwise so many, in windows spread evenly over the text.
    """
    shard = TokenShard(DataFolder(data_folder).shard(category, "validation"))
    chunks = _Chunks(shard, sequence_length)
    count = -(-max(shard.num_tokens - 1, 0) // sequence_length)
    numbers = list(range(count))
    wanted = -(-max_tokens // sequence_length) if max_tokens else count
    if wanted < count:
        numbers = [position * count // wanted for position in range(wanted)]
    for start in range(0, len(numbers), micro_batch_size):
        yield stack_samples([chunks.sample(number) for number in numbers[start : start + micro_batch_size]])
