"""Records in and parquet files out, a file at a time, so that a kill costs one file and the rest ends in the same bytes.

Each finished file is journalled with its sha256, its counts, and where its source stood afterwards; the next start takes
the source up there. A source is anything with `records(state)` and `state()`, as `hub_records.RecordStream`.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanotrain.config.errors import UserError
from nanotrain.runtime.files import file_digest, fsync_folder
from nanotrain.runtime.progress import Progress

Record = dict[str, Any]
State = dict[str, Any]
ROWS_PER_FILE = 20_000


class RecordSource(Protocol):
    """What shards are written from."""

    def records(self, state: State | None = None) -> Iterator[Record]: ...

    def state(self) -> State: ...


@dataclass
class ShardSet:
    """What was written: file names, and counts summed over the files."""

    files: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def identity(*parts: Any) -> str:
    """Return a short key of the settings that a journal's items belong to."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def text_bytes(value: Any) -> int:
    """Return the UTF-8 bytes of all text in a record."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(text_bytes, value.values()))
    return sum(map(text_bytes, value)) if isinstance(value, list) else 0


def write_parquet(file: Path, rows: list[Record], schema: pa.Schema | None = None) -> None:
    """Write rows to a parquet file under a temporary name, fsync, rename.

    Raises:
        UserError: the disk is full, or a row does not fit the schema.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary, compression="zstd")
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
        fsync_folder(file.parent)
    except (OSError, pa.ArrowException) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"`{file}` cannot be written ({' '.join(str(error).split())[:200]}); files that are finished stay, free some"
            " disk and run the same command again."
        ) from None


def write_shards(
    folder: Path,
    name: str,
    source: RecordSource,
    progress: Progress,
    key: str,
    *,
    rows_per_file: int = ROWS_PER_FILE,
    max_rows: int = 0,
    total_rows: int = 0,
    schema: pa.Schema | None = None,
    counts: Counter[str] | None = None,
) -> ShardSet:
    """Write a source's records to `folder/name-00000.parquet` and so on; files that the journal has are kept.

    Args:
        folder: where the files go.
        name: beginning of their names.
        source: the records.
        progress: the journal.
        key: `identity` of what is done; items of other settings are not looked at.
        rows_per_file: rows of a file; the last has what is left.
        max_rows: stop after so many rows; 0 = all.
        total_rows: for the progress bar, where known.
        schema: of the files; None infers it from a file's rows.
        counts: what the source counts besides rows; its growth during a file is journalled with the file.
    """
    done, state, own = ShardSet(), None, Counter() if counts is None else counts
    with tqdm(total=max_rows or total_rows or None, unit="row", desc=name) as bar:
        stream: Iterator[Record] | None = None
        for number in range(10**9):
            file = folder / f"{name}-{number:05d}.parquet"
            item_key = f"{key}:{file.name}"
            if item_key in progress and _is_whole(file, progress[item_key]):
                item = progress[item_key]
            else:
                if stream is None:
                    stream = source.records(state)
                before = Counter(own)
                wanted = min(rows_per_file, max_rows - done.counts["rows"]) if max_rows else rows_per_file
                rows = _take(stream, wanted, bar)
                item = {"state": source.state(), "rows": len(rows), "sha256": "", "bytes": sum(map(text_bytes, rows))}
                item["last"] = len(rows) < wanted or (max_rows > 0 and done.counts["rows"] + len(rows) >= max_rows)
                item["counts"] = dict(own - before)
                if rows or number == 0:
                    write_parquet(file, rows, schema)
                    item["sha256"] = file_digest(file)
                progress.record(item_key, item)
            state = item["state"]
            if item["sha256"]:
                done.files.append(file.name)
            done.counts.update({"rows": item["rows"], "bytes": item["bytes"], **item["counts"]})
            if stream is None:
                bar.update(item["rows"])
            if item["last"]:
                return done
    raise AssertionError("unreachable")


def _is_whole(file: Path, item: dict[str, Any]) -> bool:
    return not item["sha256"] or (file.is_file() and file_digest(file) == item["sha256"])


def _take(stream: Iterator[Record], count: int, bar: tqdm) -> list[Record]:
    rows = []
    for row in stream:
        rows.append(row)
        bar.update()
        if len(rows) == count:
            break
    return rows
