"""Token documents on disk in Megatron's `.bin`/`.idx` pair, read through a memory map.

`PREFIX.bin` is the tokens of all documents back to back; `PREFIX.idx` says where each document begins. The layout is
megatron-core's IndexedDataset, so either side reads what the other wrote: 9 bytes magic, version <Q, dtype code <B,
number of sequences <Q, length of the document index <Q, then int32 lengths, int64 byte offsets, int64 document index.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

import numpy as np

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.runtime.files import fsync_folder

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_BLOCK = 1 << 20
"""Documents of the index that are held in memory at a time."""
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
        size = _size_of(bin_file)
        _size_of(idx_file)
        self.dtype, lengths, pointers, documents = _parse_index(idx_file, idx_file.read_bytes())
        self._check(bin_file, size, lengths, pointers, documents)
        sequence_starts = np.append(pointers, size) // self.dtype.itemsize
        self.document_starts = sequence_starts[documents]
        """[documents + 1] int64: position of each document's first token, then the number of tokens."""
        self._tokens = np.memmap(bin_file, mode="r", dtype=self.dtype) if size else np.zeros(0, self.dtype)
        empty = np.flatnonzero(np.diff(self.document_starts) == 0)
        if empty.size:
            raise UserError(f"`{bin_file}` holds an empty document (number {empty[0]}); write the shard again without.")

    def _check(self, bin_file: Path, size: int, lengths, pointers, documents) -> None:
        """Refuse an index that points outside the tokens, before anything reads through it."""
        item, idx_file = self.dtype.itemsize, bin_file.with_suffix(".idx")
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

    def borders(self, start: int, stop: int) -> np.ndarray:
        """Return the positions in [start, stop) at which a document begins, or the shard ends; [n] int64."""
        first, last = np.searchsorted(self.document_starts, (start, stop))
        return self.document_starts[first:last]

    def document_of(self, start: int, stop: int) -> np.ndarray:
        """Return for each token position in [start, stop) the number of its document, [stop - start] int64."""
        first = int(np.searchsorted(self.document_starts, start, side="right")) - 1
        last = int(np.searchsorted(self.document_starts, stop, side="left"))
        bounds = np.clip(self.document_starts[first : last + 1], start, stop)
        return np.repeat(np.arange(first, first + len(bounds) - 1), np.diff(bounds))


def _size_of(file: Path) -> int:
    """Return the bytes of a regular file."""
    try:
        stat = file.stat()
    except OSError:
        stat = None
    if stat is None or not S_ISREG(stat.st_mode):
        raise MissingInputError(f"`{file}` is missing; run the prepare stage to write this token shard.")
    return stat.st_size


def _parse_index(idx_file: Path, raw: bytes) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Return (dtype, lengths, byte offsets, document index) of an index file."""
    if len(raw) < _HEADER.size or raw[: len(_MAGIC)] != _MAGIC:
        raise UserError(f"`{idx_file}` does not begin like a Megatron index; give the prefix of a .bin/.idx pair.")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack_from(raw)
    if version != _VERSION:
        raise UserError(f"`{idx_file}` has index version {version}; only version {_VERSION} is known.")
    if code not in _DTYPES:
        raise UserError(f"`{idx_file}` has the unknown dtype code {code}; known are {', '.join(map(str, _DTYPES))}.")
    sizes = (4 * num_sequences, 8 * num_sequences, 8 * num_bounds)
    rest = len(raw) - _HEADER.size - sum(sizes)
    if rest not in (0, num_sequences):  # multimodal data sets append one int8 mode a sequence
        raise UserError(f"`{idx_file}` has {len(raw)} bytes, {abs(rest)} {'too many' if rest > 0 else 'too few'}.")
    arrays, position = [], _HEADER.size
    for size, dtype in zip(sizes, (np.int32, np.int64, np.int64), strict=True):
        arrays.append(np.frombuffer(raw, dtype, size // np.dtype(dtype).itemsize, position))
        position += size
    return _DTYPES[code], arrays[0], arrays[1], arrays[2]


class TokenShardWriter:
    """Writes a shard under other names; `finish` fsyncs and renames, so a kill leaves no half shard.

    Memory does not grow with the shard: lengths go to a file of their own until the index is written.

    Args:
        prefix: path without `.bin`/`.idx`; the folder is made.
        dtype: of the stored tokens; `smallest_dtype(vocab_size)` is megatron-core's choice.
        work_folder: where the unfinished files lie under lasting names, so that another process can go on; by default
            they get names of this process beside the shard.
        written: (documents, tokens) in the work folder that count; what a killed process wrote after them is cut off.
    """

    def __init__(
        self,
        prefix: Path,
        dtype: np.dtype | type,
        *,
        work_folder: Path | None = None,
        written: tuple[int, int] = (0, 0),
    ) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES:
            raise UserError(
                f"dtype {self.dtype} cannot be stored in a token shard; use one of {sorted(map(str, _CODES))}."
            )
        self._final = shard_files(Path(prefix))
        self._final[0].parent.mkdir(parents=True, exist_ok=True)
        stem = self._final[0].with_name(f".{Path(prefix).name}.{os.getpid()}")
        names = [f"{stem}.{end}.tmp" for end in ("bin", "idx", "lengths")]
        self.work_files = tuple(map(Path, names)) if work_folder is None else shard_work_files(work_folder)
        self.documents, self.tokens = written
        self._bin = _open_at(self.work_files[0], self.tokens * self.dtype.itemsize)
        self._lengths = _open_at(self.work_files[2], self.documents * 4)
        integer = self.dtype.kind in "iu"
        self._range = (np.iinfo(self.dtype).min, np.iinfo(self.dtype).max) if integer else (-np.inf, np.inf)

    def add_document(self, tokens: np.ndarray | list[int]) -> None:
        """Append one document, which must not be empty.

        Raises:
            UserError: no tokens, or one that the dtype cannot hold; or the disk is full.
        """
        array = np.asarray(tokens)
        self.add_documents(array, np.asarray([array.size]))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents that lie back to back in `tokens`; raises as `add_document`."""
        name = self._final[0]
        if not lengths.size:
            return
        if lengths.min() < 1:
            number = self.documents + int(np.argmin(lengths))
            raise UserError(f"`{name}`: document {number} is empty; drop empty documents first.")
        if lengths.max() > np.iinfo(np.int32).max:
            raise UserError(f"`{name}`: a document has {lengths.max()} tokens; the format holds 2,147,483,647.")
        assert lengths.sum() == tokens.size
        low, high = tokens.min(), tokens.max()
        if low < self._range[0] or high > self._range[1]:
            raise UserError(f"`{name}`: token {low if low < 0 else high} does not fit dtype {self.dtype}.")
        self._write(self._bin, tokens.astype(self.dtype, copy=False))
        self._write(self._lengths, lengths.astype(np.int32))
        self.documents += lengths.size
        self.tokens += int(tokens.size)

    def _write(self, handle: BinaryIO, array: np.ndarray) -> None:
        try:
            handle.write(np.ascontiguousarray(array).data)
        except OSError as error:
            raise self._full(error) from None

    def _full(self, error: OSError) -> UserError:
        return UserError(
            f"`{self._final[0]}` cannot be written ({error.strerror}); every finished shard is untouched: make room and"
            " run again."
        )

    def sync(self) -> None:
        """Make what was added durable."""
        try:
            for handle in (self._bin, self._lengths):
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise self._full(error) from None

    def seal(self) -> None:
        """Write the index and fsync everything, still under the other names."""
        self.sync()
        try:
            with open(self.work_files[1], "wb") as idx:
                idx.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[self.dtype], self.documents, self.documents + 1))
                for lengths in self._length_blocks():
                    idx.write(lengths.tobytes())
                start = 0
                for lengths in self._length_blocks():
                    ends = start + np.cumsum(lengths, dtype=np.int64)
                    idx.write(((ends - lengths) * self.dtype.itemsize).tobytes())
                    start = int(ends[-1])
                for first in range(0, self.documents + 1, _BLOCK):
                    idx.write(np.arange(first, min(first + _BLOCK, self.documents + 1), dtype=np.int64).tobytes())
                idx.flush()
                os.fsync(idx.fileno())
        except OSError as error:
            raise self._full(error) from None
        self.close()

    def _length_blocks(self) -> Iterator[np.ndarray]:
        with open(self.work_files[2], "rb") as handle:
            while block := handle.read(4 * _BLOCK):
                yield np.frombuffer(block, np.int32)

    def close(self) -> None:
        """Close the files; what was not synced may be lost."""
        self._bin.close()
        self._lengths.close()

    def finish(self) -> None:
        """Write the index, fsync, and give both files their names; the index comes last."""
        self.seal()
        self.work_files[2].unlink()
        for temporary, final in zip(self.work_files[:2], self._final, strict=True):
            os.replace(temporary, final)
        fsync_folder(self._final[0].parent)


def shard_work_files(folder: Path) -> tuple[Path, Path, Path]:
    """Return where a writer keeps tokens, index and lengths in a work folder."""
    return folder / "tokens.bin", folder / "tokens.idx", folder / "lengths.int32"


def _open_at(file: Path, size: int) -> BinaryIO:
    """Open for writing after the first `size` bytes, which must be there."""
    handle = open(file, "r+b" if size else "wb")  # noqa: SIM115 - open across calls, closed by close
    handle.truncate(size)
    handle.seek(size)
    return handle
