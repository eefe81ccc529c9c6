"""Drop duplicate documents from files of records: exact copies, and near copies by MinHash-LSH.

    python -m data_prep.dedup --input FILES --output FOLDER [--text-key text] [--threshold 0.8] [--dry-run]

Of each group of duplicates the first record is kept. `dropped.parquet` says of every dropped record its number, the number
of the record kept in its place, their estimated similarity, and whether the copy is exact. Stopped at any moment, the same
command goes on and ends in the same bytes.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.program import run, size
from nanotrain.data.deduplication import DedupSettings, KeptRecords, choose_bands, find_duplicates, save_signatures
from nanotrain.data.hub_records import LocalRecords, expand_files
from nanotrain.data.manifest import write_manifest
from nanotrain.data.record_shards import ROWS_PER_FILE, identity, write_parquet, write_shards
from nanotrain.runtime.files import file_digest, remove_leftovers
from nanotrain.runtime.progress import Progress

_DROPPED = pa.schema(
    [("record", pa.int64()), ("kept_record", pa.int64()), ("similarity", pa.float32()), ("exact", pa.bool_())]
)


def deduplicate(options: argparse.Namespace) -> str:
    """Find and drop; return a line about the result."""
    settings = DedupSettings(options.threshold, options.permutations, options.shingle_words)
    settings.validate()
    files = expand_files(options.input, "`--input`")
    read = sum(Path(file).stat().st_size for file in files)
    if options.dry_run:
        bands, rows = choose_bands(settings.permutations, settings.threshold)
        how = f"{bands} bands of {rows}" if settings.threshold < 1 else "exact copies only"
        return f"would read {len(files)} files ({size(read)}) and write at most as much to {options.output}; {how}"
    options.output.mkdir(parents=True, exist_ok=True)
    work = options.output / "work"
    work.mkdir(exist_ok=True)
    for folder in (options.output, work):
        remove_leftovers(folder)
    progress = Progress(options.output / "progress.jsonl")
    digests = {Path(file).name: file_digest(Path(file)) for file in files}
    key = identity(digests, json.loads(json.dumps(asdict(settings))), options.text_key, options.rows_per_file)
    source = LocalRecords(files, "`--input`", (options.text_key,))
    duplicates = find_duplicates(save_signatures(source, options.text_key, settings, work, progress, key), settings)
    kept = KeptRecords(source, duplicates.kept)
    done = write_shards(
        options.output,
        "records",
        kept,
        progress,
        key,
        rows_per_file=options.rows_per_file,
        total_rows=int(duplicates.kept.sum()),
        schema=source.schema,
    )
    dropped = np.flatnonzero(~duplicates.kept)
    columns = (dropped, duplicates.kept_as[dropped], duplicates.similarity[dropped], duplicates.exact[dropped])
    report = [
        {"record": int(number), "kept_record": int(other), "similarity": float(alike), "exact": bool(exact)}
        for number, other, alike, exact in zip(*columns, strict=True)
    ]
    write_parquet(options.output / "dropped.parquet", report, _DROPPED)
    counts = duplicates.counts()
    sources = [{"name": name, "sha256": digest} for name, digest in digests.items()]
    content = {
        "kind": "records",
        "sources": sources,
        "settings": asdict(settings),
        "counts": counts | dict(done.counts),
    }
    write_manifest(options.output, content, [*done.files, "dropped.parquet"])
    return (
        f"{counts['records']:,} records: {counts['kept']:,} kept, {counts['exact_duplicates']:,} exact and"
        f" {counts['near_duplicates']:,} near duplicates dropped; in {options.output}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return the exit code: 0 done, 2 a mistake that one sentence explains."""
    defaults = DedupSettings()
    parser = argparse.ArgumentParser(prog="python -m data_prep.dedup", description="Drop duplicate documents.")
    parser.add_argument("--input", action="append", required=True, help="files or pattern; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="folder for records-00000.parquet and so on")
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--threshold", type=float, default=defaults.threshold, help="similarity; 1 = exact copies only")
    parser.add_argument("--permutations", type=int, default=defaults.permutations)
    parser.add_argument("--shingle-words", type=int, default=defaults.shingle_words)
    parser.add_argument("--rows-per-file", type=int, default=ROWS_PER_FILE)
    parser.add_argument("--dry-run", action="store_true", help="print what would be read and written")
    options = parser.parse_args(arguments)
    return run(lambda: deduplicate(options))


if __name__ == "__main__":
    sys.exit(main())
