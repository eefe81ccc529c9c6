"""Chat rows to packed micro-batches: each row whole, rows packed best-fit, trained only on what the assistant writes."""

from pathlib import Path
from typing import Any

import numpy as np

from nanotrain.config.data import ReasoningConfig
from nanotrain.config.errors import UserError
from nanotrain.config.training import TrainingConfig
from nanotrain.data.chat import encode_rows
from nanotrain.data.chat_rows import load_rows
from nanotrain.data.loader import GlobalBatches, Sample
from nanotrain.data.manifest import DataFolder
from nanotrain.data.packing import best_fit
from nanotrain.data.permutation import derive_key, permuted_index
from nanotrain.data.reasoning import shape_rows
from nanotrain.data.tokenizer import load_tokenizer_json
from nanotrain.model.batch import IGNORE_INDEX

TRAIN_FILE = "chat/train.jsonl"


class SftLoader(GlobalBatches):
    """Best-fit packs of conversations; in every epoch the packs come in a new order.

    Args:
        data_folder: product of the prepare stage.
        tokenizer_folder: of the checkpoint that is trained; must be the data's.
        reasoning: how traces are shaped.
        training: steps, batch sizes, sequence length.
        seed: of the run.
        dp_rank: this rank.
        dp_size: number of ranks.

    Raises:
        UserError: rows are damaged, or none fits into a sequence.
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
        super().__init__(training, dp_rank, dp_size)
        folder = DataFolder(data_folder)
        folder.check_tokenizer(tokenizer_folder)
        tokenizer = load_tokenizer_json(tokenizer_folder)
        shaped = shape_rows(load_rows(folder.file(TRAIN_FILE)), reasoning, tokenizer, seed)
        encoded = encode_rows(shaped.rows, tokenizer)
        self._length, self._seed = training.sequence_length, seed
        self._rows = [(ids, mask) for ids, mask in encoded if len(ids) <= self._length]
        if not self._rows:
            shortest = min(len(ids) for ids, _ in encoded)
            raise UserError(
                f"`stage.training.sequence_length` ({self._length}) is shorter than every conversation in"
                f" {data_folder / TRAIN_FILE}; use at least {shortest}."
            )
        self._packs = best_fit([len(ids) for ids, _ in self._rows], self._length)
        tokens = sum(len(ids) for ids, _ in self._rows)
        self._summary = {
            "rows": len(self._rows),
            "dropped_rows": len(encoded) - len(self._rows),
            "truncated_rows": shaped.truncated_rows,
            "empty_trace_rows": shaped.empty_trace_rows,
            "packs": len(self._packs),
            "packing_efficiency": tokens / (len(self._packs) * self._length),
            "epochs": training.steps * training.global_batch_size / len(self._packs),
        }

    def summary(self) -> dict[str, Any]:
        """Return counts of rows and packs, how full the packs are, and how often each is read."""
        return dict(self._summary)

    def sample(self, k: int) -> Sample:
        """Return global sample k: one pack, padded at its end."""
        epoch, position = divmod(k, len(self._packs))
        key = derive_key("packs", self._seed, epoch)
        pack = self._packs[permuted_index(position, len(self._packs), key)]
        inputs = np.zeros(self._length, np.int64)
        labels = np.full(self._length, IGNORE_INDEX, np.int64)
        segments = np.full(self._length, len(pack), np.int32)
        start = 0
        for number, row in enumerate(pack):
            ids, mask = self._rows[row]
            stop = start + len(ids)
            inputs[start:stop] = ids
            labels[start : stop - 1] = np.where(mask[1:], ids[1:], IGNORE_INDEX)
            segments[start:stop] = number
            start = stop
        return inputs, labels, segments
