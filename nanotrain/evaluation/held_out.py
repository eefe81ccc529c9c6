"""Held-out loss as bits per byte: comparable between tokenizers, unlike nats per token.

The idea to know: numerator and denominator run over the same label tokens, so a token that is not scored (the first of
a document, padding) adds neither loss nor bytes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanotrain.config.errors import UserError
from nanotrain.data.loader import validation_batches
from nanotrain.data.manifest import DataFolder
from nanotrain.data.tokenizer import token_byte_lengths
from nanotrain.engines.base import Engine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch


@dataclass(frozen=True)
class HeldOutSums:
    """What one category adds up to over its scored label tokens."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.num_bytes)


class _CountedBatches:
    """This rank's share of the batches; counts tokens and bytes of all of them on the way.

    Every rank gets equally many batches, because ranks of a sharded model must run the same number of forwards: where
    the last round has none left for a rank, it repeats a batch with no label.
    """

    def __init__(
        self, batches: Iterable[MicroBatch], byte_lengths: torch.Tensor, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        self._batches, self._byte_lengths = batches, byte_lengths
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self.num_tokens = 0
        self.num_bytes = 0

    def __iter__(self) -> Iterator[MicroBatch]:
        rank_of_next = 0
        own = last = None
        for batch in self._batches:
            scored = batch.labels[batch.labels != IGNORE_INDEX]
            self.num_tokens += scored.numel()
            self.num_bytes += int(self._byte_lengths[scored].sum())
            last = batch
            own = batch if rank_of_next == self._dp_rank else own
            rank_of_next += 1
            if rank_of_next == self._dp_size:
                assert own is not None
                yield own
                rank_of_next, own = 0, None
        if rank_of_next:
            assert last is not None
            yield own if own is not None else replace(last, labels=torch.full_like(last.labels, IGNORE_INDEX))


def held_out_sums(
    engine: Engine,
    data_folder: Path,
    category: str,
    *,
    sequence_length: int,
    micro_batch_size: int,
    max_tokens: int = 0,
    byte_lengths: np.ndarray | None = None,
) -> HeldOutSums:
    """Score the held-out documents of one category.

    Args:
        engine: runs the model; its ranks share the batches.
        data_folder: product of the prepare stage.
        category: a source that has held-out text.
        sequence_length: tokens per row.
        micro_batch_size: rows per forward pass.
        max_tokens: cap on the tokens read; 0 = all.
        byte_lengths: bytes of each token id; None = read from the data folder's tokenizer.

    Raises:
        UserError: the category has no held-out text.
    """
    if byte_lengths is None:
        byte_lengths = token_byte_lengths(data_folder / "tokenizer")
    batches = validation_batches(
        data_folder,
        category,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        max_tokens=max_tokens,
    )
    lengths = torch.from_numpy(np.asarray(byte_lengths, dtype=np.int64))
    counted = _CountedBatches(batches, lengths, engine.dp_rank, engine.dp_size)
    metrics = engine.evaluate(counted, CrossEntropy())
    if counted.num_bytes == 0:
        raise UserError(
            f"{data_folder / category / 'validation.bin'} holds no text that can be scored; prepare the data again"
            " with a larger `stage.corpus.validation_fraction`, or raise the cap on held-out tokens."
        )
    assert int(metrics["num_tokens"]) == counted.num_tokens, "the engine scored other tokens than the batches label"
    return HeldOutSums(metrics["loss"] * counted.num_tokens, counted.num_tokens, counted.num_bytes)


def combine_held_out(sums: dict[str, HeldOutSums]) -> dict[str, Any]:
    """Return `bits_per_byte` by category, their unweighted `average`, and `loss` in nats per token over all tokens."""
    assert sums
    bits = {category: one.bits_per_byte for category, one in sums.items()}
    return {
        "bits_per_byte": bits,
        "average": sum(bits.values()) / len(bits),
        "loss": sum(one.nats for one in sums.values()) / sum(one.num_tokens for one in sums.values()),
    }


def held_out_bits_per_byte(
    engine: Engine,
    data_folder: Path,
    *,
    sequence_length: int,
    micro_batch_size: int,
    max_tokens: int = 0,
    categories: Sequence[str] = (),
) -> dict[str, Any]:
    """Score the held-out documents of every category; see `held_out_sums` and `combine_held_out`.

    Args:
        max_tokens: cap on the tokens of each category; 0 = all.
        categories: which to score; none named = all that have held-out text.
    """
    byte_lengths = token_byte_lengths(data_folder / "tokenizer")
    return combine_held_out(
        {
            category: held_out_sums(
                engine,
                data_folder,
                category,
                sequence_length=sequence_length,
                micro_batch_size=micro_batch_size,
                max_tokens=max_tokens,
                byte_lengths=byte_lengths,
            )
            for category in categories or DataFolder(data_folder).sources("validation")
        }
    )
