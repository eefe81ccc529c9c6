"""Token shards and chat rows to micro-batches, by index arithmetic: any step can be asked for, in any order.

Global sample k is the same whatever the number of ranks and the size of a micro-batch; a rank takes its part of each
step's samples. Nothing is built in proportion to the amount of text.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from nanotrain.config.data import PhaseConfig, ReasoningConfig
from nanotrain.config.errors import UserError, nearest
from nanotrain.config.training import TrainingConfig
from nanotrain.data.blend import Curriculum
from nanotrain.data.chat import encode_rows
from nanotrain.data.chat_rows import load_rows
from nanotrain.data.manifest import DataFolder
from nanotrain.data.packing import best_fit
from nanotrain.data.permutation import derive_key, permuted_index
from nanotrain.data.reasoning import shape_rows
from nanotrain.data.token_shards import TokenShard
from nanotrain.data.token_source import Row, TokenSource, verify_shard, write_chunk
from nanotrain.data.tokenizer import UNK_ID, load_tokenizer_json
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch

_TRAINING_PATH = "stage.training"


def _used(curriculum: list[PhaseConfig]) -> list[str]:
    """Return the sources that are drawn from, in the order in which they first appear."""
    return list(dict.fromkeys(name for phase in curriculum for name, weight in phase.weights.items() if weight > 0))


def _batch(numbers: Sequence[int], length: int, write: Callable[[int, Row], None]) -> MicroBatch:
    """Return the samples with these numbers, each written by `write` into its row."""
    shape = (len(numbers), length)
    inputs, labels, segments = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int32)
    for row, number in enumerate(numbers):
        write(number, (inputs[row], labels[row], segments[row]))
    return MicroBatch(torch.from_numpy(inputs), torch.from_numpy(labels), torch.from_numpy(segments))


def _rank_microbatches(
    step: int, training: TrainingConfig, dp_rank: int, dp_size: int, write: Callable[[int, Row], None]
) -> list[MicroBatch]:
    """Return this rank's part of a step's global samples, in micro-batches."""
    if not 0 <= step < training.steps:
        raise IndexError(f"step {step} of {training.steps}")
    per_rank = training.global_batch_size // dp_size
    first = step * training.global_batch_size + dp_rank * per_rank
    size, length = training.micro_batch_size, training.sequence_length
    return [_batch(range(at, at + size), length, write) for at in range(first, first + per_rank, size)]


class PretrainLoader:
    """Documents concatenated and cut into sequences, drawn from a curriculum of blends.

    Each source is walked in epochs, every epoch in another order that is computed, not stored; a sequence may begin and
    end inside a document. A shard's last tokens, fewer than a sequence, are left over.

    Args:
        data_folder: product of the prepare stage; the shards that are used are checked against its manifest.
        curriculum: blends with switch points.
        training: batch sizes, sequence length, steps.
        seed: of the order.
        dp_rank: this rank.
        dp_size: number of data-parallel ranks.

    Raises:
        UserError: batch sizes that do not divide, a damaged shard, a source without a single sequence.
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
        folder = DataFolder(data_folder)
        shards = {name: folder.shards(name, "train") for name in _used(curriculum)}
        self._open(shards, curriculum, training, seed, (dp_rank, dp_size))

    @classmethod
    def from_shards(
        cls,
        sources: Mapping[str, Sequence[Path]],
        curriculum: list[PhaseConfig],
        training: TrainingConfig,
        seed: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> "PretrainLoader":
        """Build a loader over shards that lie anywhere; each is checked against its own manifest, where it has one.

        Args:
            sources: name -> prefixes of its shards; a name that no phase uses is not opened.

        Raises:
            UserError: as the class; or a source that is missing, or shards of different tokenizers.
        """
        shards: dict[str, list[Path]] = {}
        tokenizers: dict[str, Path] = {}
        for name in _used(curriculum):
            if name not in sources:
                raise UserError(f"the curriculum draws from {name!r}, which has no shards; {nearest(name, sources)}")
            verified = [verify_shard(Path(prefix)) for prefix in sources[name]]
            shards[name] = [prefix for prefix, _ in verified]
            tokenizers |= {digest: prefix for prefix, digest in verified if digest is not None}
        if len(tokenizers) > 1:
            one, other = list(tokenizers.values())[:2]
            raise UserError(f"`{one}` and `{other}` were made by different tokenizers; blend shards of one tokenizer.")
        loader = cls.__new__(cls)
        loader._open(shards, curriculum, training, seed, (dp_rank, dp_size))
        return loader

    def _open(
        self,
        shards: dict[str, list[Path]],
        curriculum: list[PhaseConfig],
        training: TrainingConfig,
        seed: int,
        rank: tuple[int, int],
    ) -> None:
        self._dp_rank, self._dp_size = rank
        training.validate_batch(_TRAINING_PATH, self._dp_size)
        assert 0 <= self._dp_rank < self._dp_size
        self._training, self._seed = training, seed
        self._curriculum = Curriculum(curriculum, training.steps * training.global_batch_size)
        length = training.sequence_length
        self._sources = {name: TokenSource(name, prefixes, length) for name, prefixes in shards.items()}

    @property
    def num_tokens_available(self) -> int:
        """Training tokens of all sources in the curriculum."""
        return sum(source.num_tokens for source in self._sources.values())

    def plan(self) -> dict[str, int]:
        """Return the number of samples that each source gives over the whole stage."""
        return dict(self._curriculum.totals)

    def epochs(self) -> dict[str, float]:
        """Return how many times the stage walks through each source."""
        return {name: count / self._sources[name].num_sequences for name, count in self._curriculum.totals.items()}

    def _write(self, k: int, row: Row) -> None:
        name, number = self._curriculum.draw(k)
        source = self._sources[name]
        epoch, position = divmod(number, source.num_sequences)
        key = derive_key("chunks", self._seed, name, epoch)
        source.write_sequence(permuted_index(position, source.num_sequences, key), row)

    def microbatches(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of an optimizer step; [B, S] each."""
        return _rank_microbatches(step, self._training, self._dp_rank, self._dp_size, self._write)


class SftLoader:
    """Chat rows, shaped for thinking control and packed best-fit; only what the assistant writes is trained.

    Rows are encoded once, when the loader is made. A row is a segment; padding is a segment of its own without labels.

    Args:
        data_folder: product of the prepare stage.
        tokenizer_folder: of the checkpoint that is trained; it must be the tokenizer that prepared the data.
        reasoning: shares of empty and cut traces.
        training: batch sizes, sequence length, steps.
        seed: of the choice of rows and of the order.
        dp_rank: this rank.
        dp_size: number of data-parallel ranks.

    Raises:
        UserError: batch sizes that do not divide, damaged rows, another tokenizer, or no row that fits.
    """

    def __init__(
        self,
        data_folder: Path,
        tokenizer_folder: Path,
        reasoning: ReasoningConfig,
        training: TrainingConfig,
        seed: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        training.validate_batch(_TRAINING_PATH, dp_size)
        assert 0 <= dp_rank < dp_size
        self._training, self._seed, self._dp_rank, self._dp_size = training, seed, dp_rank, dp_size
        folder = DataFolder(data_folder)
        folder.check_tokenizer(tokenizer_folder)
        tokenizer = load_tokenizer_json(tokenizer_folder)
        file = folder.file("chat/train.jsonl")
        rows = shape_rows(load_rows(file), reasoning, tokenizer, seed)
        encoded = encode_rows(rows, tokenizer)
        fits = [len(ids) - 1 <= training.sequence_length and mask[1:].any() for ids, mask in encoded]
        self._rows = [pair for pair, fit in zip(encoded, fits, strict=True) if fit]
        if not self._rows:
            raise UserError(
                f"none of the {len(rows)} rows of `{file}` fits `{_TRAINING_PATH}.sequence_length`"
                f" ({training.sequence_length}); the shortest has {min((len(ids) for ids, _ in encoded), default=0)}"
                " tokens."
            )
        self._packs = best_fit([len(ids) - 1 for ids, _ in self._rows], training.sequence_length)
        shapes = Counter(
            row["metadata"]["shape"]
            for row, fit in zip(rows, fits, strict=True)
            if fit and "metadata" in row and "shape" in row["metadata"]
        )
        filled = sum(len(ids) - 1 for ids, _ in self._rows)
        self._summary = {
            "rows": len(self._rows),
            "dropped_rows": len(rows) - len(self._rows),
            "truncated_rows": shapes["truncated"],
            "empty_trace_rows": shapes["empty_trace"],
            "packs": len(self._packs),
            "packing_efficiency": filled / (len(self._packs) * training.sequence_length),
            "trained_tokens": int(sum(mask[1:].sum() for _, mask in self._rows)),
            "epochs": training.steps * training.global_batch_size / len(self._packs),
        }

    @property
    def num_tokens_available(self) -> int:
        """Tokens of all rows that fit."""
        return sum(len(ids) for ids, _ in self._rows)

    def summary(self) -> dict[str, int | float]:
        """Return rows, dropped_rows (too long), truncated_rows, empty_trace_rows, packs, packing_efficiency, epochs."""
        return dict(self._summary)

    def _write(self, k: int, row: Row) -> None:
        epoch, position = divmod(k, len(self._packs))
        pack = permuted_index(position, len(self._packs), derive_key("packs", self._seed, epoch))
        inputs, labels, segments = row
        inputs[:], labels[:] = UNK_ID, IGNORE_INDEX
        segments[:] = len(self._packs[pack])  # what is left over is the padding's segment
        start = 0
        for segment, number in enumerate(self._packs[pack]):
            ids, trained = self._rows[number]
            stop = start + len(ids) - 1
            inputs[start:stop] = ids[:-1]
            labels[start:stop] = np.where(trained[1:], ids[1:], IGNORE_INDEX)
            segments[start:stop] = segment
            start = stop

    def microbatches(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of an optimizer step; [B, S] each."""
        return _rank_microbatches(step, self._training, self._dp_rank, self._dp_size, self._write)


def validation_batches(
    data_folder: Path, category: str, *, sequence_length: int, micro_batch_size: int, max_tokens: int = 0
) -> Iterator[MicroBatch]:
    """Yield a category's held-out text in order, concatenated and cut, the last sequence padded.

    Every token that has a predecessor in its document is a label exactly once.

    Args:
        data_folder: product of the prepare stage.
        category: one of config.data.CATEGORIES.
        sequence_length: tokens of a sequence; the last batch may have fewer sequences.
        micro_batch_size: sequences of a batch.
        max_tokens: stop after the first so many tokens; 0 = all.
    """
    shard = TokenShard(DataFolder(data_folder).shard(category, "validation"))
    total = min(shard.num_tokens, max_tokens) if max_tokens else shard.num_tokens

    def write(start: int, row: Row) -> None:
        length = min(sequence_length, total - 1 - start)
        inputs, labels, segments = row
        write_chunk(shard, start, (inputs[:length], labels[:length], segments[:length]))
        inputs[length:], labels[length:], segments[length:] = UNK_ID, IGNORE_INDEX, segments[length - 1] + 1

    starts = range(0, total - 1, sequence_length)
    for first in range(0, len(starts), micro_batch_size):
        yield _batch(starts[first : first + micro_batch_size], sequence_length, write)
