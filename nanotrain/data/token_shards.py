"""Token documents on disk in Megatron's `.bin`/`.idx` pair, read through a memory map.

`PREFIX.bin` is the tokens of all documents back to back; `PREFIX.idx` says where each document begins. The layout is
megatron-core's IndexedDataset, so either side reads what the other wrote: 9 bytes magic, version <Q, dtype code <B,
number of sequences <Q, length of the document index <Q, then int32 lengths, int64 byte offsets, int64 document index.
"""

import os
import struct
from pathlib import Path

import numpy as np

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.runtime.files import fsync_folder

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def shard_files(prefix: Path) -> tuple[Path, Path]:
    """Return the `.bin` and `.idx` paths of a shard."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that megatron-core chooses for ids below `vocab_size`: uint16 or int32."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


class TokenShard:
    """A finished shard.

    Args:
        prefix: path without `.bin`/`.idx`.

    Raises:
        MissingInputError: a file of the pair is not there.
        UserError: the index is not one, or does not fit the tokens.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        bin_file, idx_file = shard_files(self.prefix)
        for file in (bin_file, idx_file):
            if not file.is_file():
                raise MissingInputError(f"`{file}` is missing; run the prepare stage to write this token shard.")
        raw = np.memmap(idx_file, mode="r", dtype=np.uint8) if idx_file.stat().st_size else np.zeros(0, np.uint8)
        self.dtype, lengths, pointers, documents = _parse_index(idx_file, raw)
        self._check(bin_file, idx_file, lengths, pointers, documents)
        sequence_starts = np.concatenate([pointers // self.dtype.itemsize, [bin_file.stat().st_size]])
        sequence_starts[-1] //= self.dtype.itemsize
        self.document_starts = sequence_starts[documents]
        """[documents + 1] int64: position of each document's first token, then the number of tokens."""
        has_tokens = bin_file.stat().st_size > 0
        self._tokens = np.memmap(bin_file, mode="r", dtype=self.dtype) if has_tokens else np.zeros(0, self.dtype)
        empty = np.flatnonzero(np.diff(self.document_starts) == 0)
        if empty.size:
            raise UserError(f"`{bin_file}` holds an empty document (number {empty[0]}); write the shard again without.")

    def _check(self, bin_file: Path, idx_file: Path, lengths, pointers, documents) -> None:
        """Refuse an index that points outside the tokens, before anything reads through it."""
        size, item = bin_file.stat().st_size, self.dtype.itemsize
        ends = np.cumsum(lengths, dtype=np.int64) * item
        expected = int(ends[-1]) if lengths.size else 0
        if size != expected:
            raise UserError(
                f"`{bin_file}` has {size} bytes where its index `{idx_file.name}` says {expected}; the file is"
                " truncated or belongs to another index: run the prepare stage again."
            )
        contiguous = (lengths >= 0).all() and np.array_equal(pointers, ends - lengths.astype(np.int64) * item)
        ordered = documents.size > 0 and documents[0] == 0 and documents[-1] == lengths.size
        if not (contiguous and ordered and (np.diff(documents) >= 0).all()):
            raise UserError(f"`{idx_file}` has offsets that do not follow one another; run the prepare stage again.")

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document, [length], as a view into the file."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.prefix}")
        return self._tokens[self.document_starts[index] : self.document_starts[index + 1]]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of the concatenation of all documents, as a view into the file."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.num_tokens} in {self.prefix}")
        return self._tokens[start:stop]

    def document_of(self, start: int, stop: int) -> np.ndarray:
        """Return for each token position in [start, stop) the number of its document, [stop - start] int64."""
        first = int(np.searchsorted(self.document_starts, start, side="right")) - 1
        last = int(np.searchsorted(self.document_starts, stop, side="left"))
        bounds = np.clip(self.document_starts[first : last + 1], start, stop)
        return np.repeat(np.arange(first, first + len(bounds) - 1), np.diff(bounds))


def _parse_index(idx_file: Path, raw: np.ndarray) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Return (dtype, lengths, byte offsets, document index) of an index file."""
    if raw.size < _HEADER.size or bytes(raw[: len(_MAGIC)]) != _MAGIC:
        raise UserError(f"`{idx_file}` does not begin like a Megatron index; give the prefix of a .bin/.idx pair.")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(bytes(raw[: _HEADER.size]))
    if version != _VERSION:
        raise UserError(f"`{idx_file}` has index version {version}; only version {_VERSION} is known.")
    if code not in _DTYPES:
        raise UserError(f"`{idx_file}` has the unknown dtype code {code}; known are {', '.join(map(str, _DTYPES))}.")
    sizes = (4 * num_sequences, 8 * num_sequences, 8 * num_bounds)
    rest = raw.size - _HEADER.size - sum(sizes)
    if rest not in (0, num_sequences):  # multimodal data sets append one int8 mode a sequence
        raise UserError(f"`{idx_file}` has {raw.size} bytes, {abs(rest)} {'too many' if rest > 0 else 'too few'}.")
    arrays, position = [], _HEADER.size
    for size, dtype in zip(sizes, (np.int32, np.int64, np.int64), strict=True):
        arrays.append(np.frombuffer(raw[position : position + size].tobytes(), dtype=dtype))
        position += size
    return _DTYPES[code], arrays[0], arrays[1], arrays[2]


class TokenShardWriter:
    """Writes a shard under temporary names; `finish` fsyncs and renames, so a kill leaves no half shard.

    Args:
        prefix: path without `.bin`/`.idx`; the folder is made.
        dtype: of the stored tokens; `smallest_dtype(vocab_size)` is megatron-core's choice.
    """

    def __init__(self, prefix: Path, dtype: np.dtype | type) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES:
            raise UserError(
                f"dtype {self.dtype} cannot be stored in a token shard; use one of {sorted(map(str, _CODES))}."
            )
        self._final = shard_files(Path(prefix))
        self._final[0].parent.mkdir(parents=True, exist_ok=True)
        self._temporary = tuple(file.with_name(f".{file.name}.{os.getpid()}.tmp") for file in self._final)
        self._bin = open(self._temporary[0], "wb")  # noqa: SIM115 - open across calls, closed by finish
        self._lengths: list[int] = []
        self._bounds = [0]
        integer = self.dtype.kind in "iu"
        self._range = (np.iinfo(self.dtype).min, np.iinfo(self.dtype).max) if integer else (-np.inf, np.inf)

    def add_document(self, tokens: np.ndarray | list[int]) -> None:
        """Append one document, which must not be empty.

        Raises:
            UserError: no tokens, or one that the dtype cannot hold.
        """
        array = np.asarray(tokens)
        if array.size == 0:
            raise UserError(
                f"`{self._final[0]}`: document {len(self._bounds) - 1} is empty; drop empty documents first."
            )
        low, high = array.min(), array.max()
        if low < self._range[0] or high > self._range[1]:
            raise UserError(f"`{self._final[0]}`: token {low if low < 0 else high} does not fit dtype {self.dtype}.")
        self._bin.write(array.astype(self.dtype, copy=False).tobytes())
        self._lengths.append(array.size)
        self._bounds.append(len(self._lengths))

    def finish(self) -> None:
        """Write the index, fsync both files, and give them their names; the index comes last."""
        lengths = np.asarray(self._lengths, np.int64)
        pointers = (np.cumsum(lengths) - lengths) * self.dtype.itemsize
        header = _HEADER.pack(_MAGIC, _VERSION, _CODES[self.dtype], len(lengths), len(self._bounds))
        with open(self._temporary[1], "wb") as idx:
            for part in (lengths.astype(np.int32), pointers.astype(np.int64), np.asarray(self._bounds, np.int64)):
                header += part.tobytes()
            idx.write(header)
            idx.flush()
            os.fsync(idx.fileno())
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        for temporary, final in zip(self._temporary, self._final, strict=True):
            os.replace(temporary, final)
        fsync_folder(self._final[0].parent)
