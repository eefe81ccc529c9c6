"""Records of jsonl (plain, .gz, .zst), parquet and plain-text files: the right data, or one sentence that names the place.

A file is read in chunks, each a small description that another process can read on its own. The chunks of a file and
their order depend on the file alone, so work that is cut up by chunks gives the same result with any number of workers.
"""

import gzip
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data.documents import decode_utf8

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHUNK_BYTES = 1 << 23
"""Text of one chunk; part of what a chunk is, so part of the identity of a resumable job."""
TEXT_KEY = "text"
"""The one key of a plain-text file's record."""
_BATCH_ROWS = 1024
_COMPRESSED = (".gz", ".zst")
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}
_DAMAGE = (OSError, EOFError, zlib.error, zstd.ZstdError, pa.ArrowException, UnicodeDecodeError)


@dataclass(frozen=True)
class Chunk:
    """A piece of one file.

    Attributes:
        file: where it is from.
        kind: jsonl, parquet or text.
        start: byte (jsonl), row group (parquet) or 0 (text).
        stop: end of the same; a jsonl record belongs to the chunk in which it begins.
        file_bytes: share of the file's size on disk, for progress.
        lines: the bytes themselves where the file cannot be entered in the middle (compressed), else None.
        first_line: number of lines before `lines`.
    """

    file: Path
    kind: str
    start: int
    stop: int
    file_bytes: int
    lines: bytes | None = None
    first_line: int = 0


def file_kind(file: Path) -> str:
    """Return jsonl, parquet or text, by the file's suffixes.

    Raises:
        UserError: another suffix.
    """
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    last = suffixes[-1] if suffixes else ""
    compressed = last in _COMPRESSED
    inner = suffixes[-2] if compressed and len(suffixes) > 1 else last
    if inner not in _KINDS or (compressed and _KINDS[inner] == "parquet"):
        raise UserError(
            f"`{file}` has no ending that is known; known are {', '.join(_KINDS)}, and all but .parquet with .gz or"
            " .zst after it."
        )
    return _KINDS[inner]


def plan_chunks(file: Path) -> Iterator[Chunk]:
    """Yield the chunks of a file in order; a compressed file is unpacked on the way.

    Raises:
        MissingInputError: the file is not there.
        UserError: an unknown ending, or a damaged file.
    """
    file = Path(file)
    kind = file_kind(file)
    if not file.is_file():
        raise MissingInputError(f"`{file}` is missing or not a file; correct the path.")
    if kind == "parquet":
        yield from _plan_parquet(file)
    elif kind == "text":
        yield Chunk(file, kind, 0, 1, file.stat().st_size)
    elif file.suffix.lower() in _COMPRESSED:
        yield from _plan_compressed(file)
    else:
        size = file.stat().st_size
        for start in range(0, size, CHUNK_BYTES):
            stop = min(size, start + CHUNK_BYTES)
            yield Chunk(file, kind, start, stop, stop - start)


def read_chunk(chunk: Chunk, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of a chunk, each with exactly `keys`, or with all its keys when `keys` is empty.

    Raises:
        UserError: damage, or a record without one of the keys; the message names the file and the line or row.
    """
    if chunk.kind == "parquet":
        yield from _read_row_group(chunk, keys)
    elif chunk.kind == "text":
        yield from _read_text(chunk.file, keys)
    else:
        yield from _read_lines(chunk, keys)


def read_records(file: Path, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of one file in order, each with exactly `keys`, or with all its keys when `keys` is empty.

    A .jsonl record is a line that holds a JSON object (blank lines are passed over); a parquet record is a row; a
    plain-text file is one record with the key `text`.

    Args:
        file: .jsonl, .ndjson or .json (a record a line), .txt, .md, each with or without .gz/.zst; or .parquet.
        keys: of the values that are wanted; parquet reads only these columns.

    Raises:
        MissingInputError: the file is not there.
        UserError: an unknown ending, damage (cut off, a wrong checksum, not UTF-8, not JSON), or a missing key; the
            message names the file and the line or row.
    """
    for chunk in plan_chunks(file):
        yield from read_chunk(chunk, keys)


def _damaged(file: Path, place: str, error: object) -> UserError:
    reason = " ".join(str(error).replace("`", "'").split()) or type(error).__name__
    return UserError(f"`{file}` cannot be read {place} ({reason}); it is cut off or damaged: fetch it again.")


def _unpack(raw: BinaryIO, file: Path) -> BinaryIO:
    """Return the reader of what `raw` holds: `raw` itself, or what its compression gives."""
    if file.suffix.lower() == ".gz":
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    return zstd.open(raw, "rb") if file.suffix.lower() == ".zst" else raw  # type: ignore[return-value]


def _plan_compressed(file: Path) -> Iterator[Chunk]:
    """Unpack whole lines, about CHUNK_BYTES at a time."""
    first_line, told = 0, 0
    try:
        if not file.stat().st_size:
            raise EOFError("it has no bytes at all")  # gzip would take that for an empty text
        with open(file, "rb") as raw, _unpack(raw, file) as unpacked:
            while lines := unpacked.read(CHUNK_BYTES):
                if not lines.endswith(b"\n"):
                    lines += unpacked.readline()
                position = raw.tell()
                yield Chunk(file, "jsonl", 0, len(lines), position - told, lines, first_line)
                told, first_line = position, first_line + lines.count(b"\n")
    except _DAMAGE as error:
        raise _damaged(file, f"after line {first_line}", error) from None


def _read_lines(chunk: Chunk, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    data = _range_of_lines(chunk) if chunk.lines is None else chunk.lines
    for number, line in enumerate(data.split(b"\n")):
        if line and not line.isspace():
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                reason = f"not JSON: {error.msg}, column {error.colno}"
                raise _bad_line(chunk, number, reason) from None
            if type(record) is not dict:
                raise _bad_line(chunk, number, f"a JSON {type(record).__name__}, not an object")
            if keys:
                try:
                    record = {key: record[key] for key in keys}
                except KeyError as error:
                    found = ", ".join(list(record)[:12]) or "none"
                    reason = f"it has no key {error.args[0]!r}; its keys are {found}"
                    raise _bad_line(chunk, number, reason) from None
            yield record


def _range_of_lines(chunk: Chunk) -> bytes:
    """Return the lines that begin in [start, stop) of a plain file."""
    try:
        with open(chunk.file, "rb") as handle:
            if chunk.start:
                handle.seek(chunk.start - 1)
                handle.readline()
            begin = handle.tell()
            if begin >= chunk.stop:
                return b""
            data = handle.read(chunk.stop - begin)
            return data if data.endswith(b"\n") else data + handle.readline()
    except OSError as error:
        raise _damaged(chunk.file, f"at byte {chunk.start}", error) from None


def _bad_line(chunk: Chunk, number: int, reason: str) -> UserError:
    line = chunk.first_line + number + 1
    if chunk.lines is None and chunk.start:
        with open(chunk.file, "rb") as handle:  # lines are counted only now that the number is needed
            line += handle.read(chunk.start - 1).count(b"\n") + 1
    return UserError(f"`{chunk.file}`, line {line}: {reason}; correct or remove the line.")


def _plan_parquet(file: Path) -> Iterator[Chunk]:
    try:
        with pq.ParquetFile(file) as parquet:
            rows = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    except _DAMAGE as error:
        raise _damaged(file, "as parquet", error) from None
    size, total, told, before = file.stat().st_size, sum(rows), 0, 0
    for number, count in enumerate(rows):
        before += count
        position = size * before // max(1, total)
        yield Chunk(file, "parquet", number, number + 1, position - told, first_line=before - count)
        told = position


def _read_row_group(chunk: Chunk, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    row = chunk.first_line
    try:
        with pq.ParquetFile(chunk.file, page_checksum_verification=True) as parquet:
            missing = [key for key in keys if key not in parquet.schema_arrow.names]
            if missing:
                raise UserError(
                    f"`{chunk.file}` has no column {missing[0]!r}; its columns are"
                    f" {', '.join(parquet.schema_arrow.names[:20])}."
                )
            columns = list(keys) or None
            for batch in parquet.iter_batches(_BATCH_ROWS, [chunk.start], columns, use_threads=False):
                yield from batch.to_pylist()
                row += batch.num_rows
    except _DAMAGE as error:
        raise _damaged(chunk.file, f"after row {row}", error) from None


def _read_text(file: Path, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    if [key for key in keys if key != TEXT_KEY]:
        raise UserError(f"`{file}` is plain text, so its only key is {TEXT_KEY!r}, not {', '.join(map(repr, keys))}.")
    try:
        with open(file, "rb") as raw, _unpack(raw, file) as unpacked:
            content = unpacked.read()
    except _DAMAGE as error:
        raise _damaged(file, "as text", error) from None
    yield {TEXT_KEY: decode_utf8(content, str(file))}
