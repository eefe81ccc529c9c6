"""One chunk of records to tokens: what a worker process does, with no state but its encoder."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanotrain.config.errors import UserError
from nanotrain.data.encoders import HfEncoder, Ids, TextEncoder, known_encoder
from nanotrain.data.record_files import Chunk, read_chunk

_BATCH_BYTES = 1 << 23
"""Characters that are encoded in one call; bounds memory where a parquet row group is large."""
_CHECKED_CHARACTERS = 1000
"""Of one document a batch, encoded a second time by `tokenizers`; 0.01% of the text."""


@dataclass(frozen=True)
class EncodedChunk:
    """Documents of one chunk, eos at the end of each.

    Attributes:
        tokens: [n], in the shard's dtype, back to back.
        lengths: [documents] int64.
        empty: records whose text is empty or null; they are left out.
        text_bytes: of the documents, UTF-8.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    empty: int
    text_bytes: int


def append_eos(ids: np.ndarray, lengths: np.ndarray, eos: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids with `eos` after each text, and the new lengths."""
    longer = lengths + 1
    last = np.cumsum(longer) - 1
    out = np.empty(ids.size + lengths.size, dtype)
    body = np.ones(out.size, bool)
    body[last] = False
    out[body] = ids
    out[last] = eos
    return out, longer


class ChunkEncoder:
    """Reads a chunk and encodes it.

    Args:
        encoder: the fast one.
        exact: `tokenizers`, for the sample that is compared.
        text_key: of the records.
        eos: id after each document.
        dtype: of the tokens.
    """

    def __init__(self, encoder: TextEncoder, exact: HfEncoder, text_key: str, eos: int, dtype: np.dtype) -> None:
        self._encoder, self._exact, self._key, self._eos, self._dtype = encoder, exact, text_key, eos, dtype

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """Encode all documents of the chunk.

        Raises:
            UserError: as `read_chunk`; a text that is not a string; or ids that are not the tokenizer's.
        """
        parts, empty, text_bytes = [], 0, 0
        for texts, skipped in self._batches(chunk):
            empty += skipped
            text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
            parts.append(append_eos(*self._encode(texts, chunk.file), self._eos, self._dtype))
        tokens = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, self._dtype)
        lengths = np.concatenate([part[1] for part in parts]) if parts else np.zeros(0, np.int64)
        return EncodedChunk(tokens, lengths, empty, text_bytes)

    def _batches(self, chunk: Chunk) -> Iterator[tuple[list[str], int]]:
        texts: list[str] = []
        size = empty = 0
        for record in read_chunk(chunk, [self._key]):
            text = record[self._key]
            if not text and (text is None or isinstance(text, str)):
                empty += 1
                continue
            if not isinstance(text, str):
                raise UserError(
                    f"`{chunk.file}` holds a {type(text).__name__} under {self._key!r} ({str(text)[:40]!r}), which is"
                    " not text; name the text's own key with --text-key."
                )
            texts.append(text)
            size += len(text)
            if size >= _BATCH_BYTES:
                yield texts, empty
                texts, size, empty = [], 0, 0
        if texts or empty:
            yield texts, empty

    def _encode(self, texts: list[str], file: Path) -> Ids:
        if texts and self._encoder is not self._exact:
            sample = [texts[len(texts) // 2][:_CHECKED_CHARACTERS]]
            if not np.array_equal(self._encoder.encode_batch(sample)[0], self._exact.encode_batch(sample)[0]):
                raise UserError(
                    f"the {self._encoder.name} encoder gave other ids than tokenizer.json for a text of `{file}`; nothing"
                    " of that batch was written: run again with --encoder tokenizers."
                )
        return self._encoder.encode_batch(texts)


_STATE: dict[str, ChunkEncoder] = {}


def start_worker(folder: Path, encoder_name: str, text_key: str, eos: int, dtype: str) -> None:
    """Build this process's encoder; end the process when its parent is gone, which a killed parent cannot ask for."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    encoder, exact = known_encoder(folder, encoder_name)
    _STATE["encoder"] = ChunkEncoder(encoder, exact, text_key, eos, np.dtype(dtype))


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def encode_in_worker(chunk: Chunk) -> EncodedChunk:
    """Encode with the encoder of `start_worker`."""
    return _STATE["encoder"](chunk)
