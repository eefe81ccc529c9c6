"""Samples of the long-context phase: long documents with question-answer pairs about a tenth of their chunks.

    python -m data_prep.build_long_context --input FILES --tokenizer FOLDER --output FOLDER --chunks-only
    python -m data_prep.build_long_context --input FILES --tokenizer FOLDER --output FOLDER --pairs FILES
    python -m data_prep.build_long_context --input FILES --tokenizer FOLDER --output FOLDER --generator COMMAND

The first writes the chosen chunks ({"document", "chunks": [{"chunk", "text"}]}) for a model to be run on elsewhere; the
second takes its pairs (records with document, chunk, question, answer); the third asks a command, line by line. The
released set `nemotron_pretraining_long_context_v1` needs none of this. Stopped at any moment, the same command goes on.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from data_prep.program import run, size
from nanotrain.config.errors import UserError
from nanotrain.data.hub_records import LocalRecords, expand_files
from nanotrain.data.long_documents import (
    CommandGenerator,
    LongDocuments,
    LongDocumentSettings,
    pairs_from_records,
)
from nanotrain.data.manifest import write_manifest
from nanotrain.data.record_shards import identity, write_shards
from nanotrain.data.tokenizer import load_tokenizer_json
from nanotrain.runtime.files import file_digest, remove_leftovers
from nanotrain.runtime.progress import Progress


def build(options: argparse.Namespace) -> str:
    """Build the samples, or the list of chunks; return a line about the result."""
    ways = [bool(options.chunks_only), bool(options.pairs), bool(options.generator)]
    if sum(ways) != 1:
        raise UserError("name exactly one of `--chunks-only`, `--pairs FILES` and `--generator COMMAND`.")
    settings = LongDocumentSettings(options.min_tokens, options.chunk_tokens, options.chunk_fraction, options.seed)
    settings.validate()
    files = expand_files(options.input, "`--input`")
    if options.dry_run:
        read = sum(Path(file).stat().st_size for file in files)
        return f"would read {len(files)} files ({size(read)}) and write at most a little more to {options.output}"
    options.output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(options.output)
    tokenizer = load_tokenizer_json(options.tokenizer)
    digests = {Path(file).name: file_digest(Path(file)) for file in [*files, *expand_files(options.pairs, "`--pairs`")]}
    digest = file_digest(options.tokenizer / "tokenizer.json")
    needed = (options.text_key, options.id_key) if options.id_key else (options.text_key,)
    source = LocalRecords(files, "`--input`", needed)
    name = "chunks" if options.chunks_only else "long_documents"
    key = identity(
        digests, digest, json.loads(json.dumps(asdict(settings))), options.generator, needed, options.rows_per_file
    )
    with _generator(options) as generate:
        documents = LongDocuments(source, options.text_key, options.id_key, tokenizer, settings, generate)
        done = write_shards(
            options.output,
            name,
            documents,
            Progress(options.output / "progress.jsonl"),
            key,
            rows_per_file=options.rows_per_file,
            counts=documents.counts,
        )
    sources = [{"name": name, "sha256": sha256} for name, sha256 in digests.items()]
    content = {"kind": "records", "sources": sources, "settings": asdict(settings), "tokenizer_digest": digest}
    write_manifest(options.output, content | {"counts": dict(done.counts)}, done.files)
    counts = done.counts
    return (
        f"{counts['documents']:,} documents, {counts['long_documents']:,} of them long, {counts['chunks_chosen']:,} chunks,"
        f" {counts['pairs']:,} pairs, {counts['without_pair']:,} long documents left out for want of a pair; in {options.output}"
    )


def _generator(options: argparse.Namespace):
    """Return a context manager that gives the generator of pairs, or None."""
    if options.generator:
        return CommandGenerator(options.generator)
    found: Callable | None = None
    if options.pairs:
        needed = ("document", "chunk", "question", "answer")
        found = pairs_from_records(LocalRecords(options.pairs, "`--pairs`", needed).records(), "`--pairs`")
    return nullcontext(found)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return the exit code: 0 done, 2 a mistake that one sentence explains."""
    defaults = LongDocumentSettings()
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.build_long_context", description="Long documents with QA."
    )
    parser.add_argument("--input", action="append", required=True, help="files with long documents; may be repeated")
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--id-key", default="", help="column of the document's id; default: its number")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--chunks-only", action="store_true", help="write the chosen chunks instead of samples")
    parser.add_argument("--pairs", action="append", default=[], help="records with document, chunk, question, answer")
    parser.add_argument("--generator", default="", help="command that answers a JSON line a chunk")
    parser.add_argument("--min-tokens", type=int, default=defaults.min_tokens)
    parser.add_argument("--chunk-tokens", type=int, default=defaults.chunk_tokens)
    parser.add_argument("--chunk-fraction", type=float, default=defaults.chunk_fraction)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--rows-per-file", type=int, default=500)
    parser.add_argument("--dry-run", action="store_true", help="print what would be read and written")
    options = parser.parse_args(arguments)
    return run(lambda: build(options))


if __name__ == "__main__":
    sys.exit(main())
