"""Training text for forward passes that score what to prune. Held-out text is never looked at here."""

from pathlib import Path

import torch

from nanotrain.config.data import PhaseConfig
from nanotrain.config.errors import UserError
from nanotrain.config.training import TrainingConfig
from nanotrain.data.loader import PretrainLoader
from nanotrain.data.manifest import DataFolder
from nanotrain.data.token_shards import TokenShard
from nanotrain.model.batch import MicroBatch


def calibration_batches(
    data_folder: Path, *, num_samples: int, sequence_length: int, micro_batch_size: int, seed: int
) -> list[MicroBatch]:
    """Draw calibration samples from the training text, all categories in equal shares.

    Args:
        data_folder: product of the prepare stage.
        num_samples: sequences in all; the last batch may be smaller.
        sequence_length: tokens per sequence; documents are packed.
        micro_batch_size: sequences per batch.
        seed: decides which sequences.

    Raises:
        UserError: a category is damaged, or shorter than one sequence.
    """
    folder = DataFolder(data_folder)
    sources = folder.sources("train")
    for category in sources:
        num_tokens = TokenShard(folder.shard(category, "train")).num_tokens
        if num_tokens <= sequence_length:
            raise UserError(
                f"`{data_folder}/{category}/train.bin` holds {num_tokens} tokens, fewer than one sequence of"
                f" `stage.calibration_sequence_length` ({sequence_length}) + 1; shorten it or prepare more text."
            )
    num_batches = -(-num_samples // micro_batch_size)
    sizes = TrainingConfig(
        steps=num_batches,
        global_batch_size=micro_batch_size,
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        learning_rate=1.0,  # the loader has no use for it
    )
    blend = [PhaseConfig(until=1.0, weights=dict.fromkeys(sources, 1.0))]
    loader = PretrainLoader(data_folder, blend, sizes, seed)
    batches = [batch for step in range(num_batches) for batch in loader.microbatches(step)]
    batches[-1] = _first_rows(batches[-1], num_samples - (num_batches - 1) * micro_batch_size)
    return batches


def _first_rows(batch: MicroBatch, count: int) -> MicroBatch:
    segments: torch.Tensor | None = batch.segment_ids
    return MicroBatch(batch.input_ids[:count], batch.labels[:count], None if segments is None else segments[:count])
