"""Fetch the contents of the files that Nemotron-Pretraining-Code-v1 only names.

    python -m data_prep.fetch_code --output FOLDER [--input FILES] [--url TEMPLATE] [--concurrency N] [--dry-run]

References (repo, commit_id, rel_path) come from the component `nemotron_pretraining_code_v1`, or with `--input` from
parquet or jsonl files of that form. Every column of a reference is kept beside the `text`, a licence column among them.
Files that are gone are counted. Stopped at any moment, the same command goes on where it was.
"""

import argparse
import sys
from pathlib import Path

import pyarrow as pa

from data_prep.program import run, size
from nanotrain.config.errors import UserError
from nanotrain.config.sources import ComponentConfig, RecordForm, load_component
from nanotrain.data.code_contents import CodeContents, FetchSettings, file_url
from nanotrain.data.hub_records import open_records
from nanotrain.data.manifest import write_manifest
from nanotrain.data.record_shards import identity, write_shards
from nanotrain.runtime.files import remove_leftovers
from nanotrain.runtime.progress import Progress

_TYPICAL_FILE_BYTES = 6000
"""For the dry run only: our own guess at the mean size of a source file."""
_EXAMPLE = {"repo": "owner/name", "commit_id": "0123456", "rel_path": "src/main.c"}


def references_of(options: argparse.Namespace) -> tuple[ComponentConfig, str]:
    """Return the component and the subset whose references are fetched."""
    component = load_component(options.component)
    names = [name for name, subset in component.subsets.items() if subset.form is RecordForm.code_reference]
    if len(names) != 1:
        raise UserError(f"`--component` ({options.component}) must have exactly one subset of the form code_reference.")
    if options.input:
        component.subsets[names[0]].local_files = options.input
    return component, names[0]


def with_text(schema: pa.Schema | None) -> pa.Schema | None:
    """Return the schema of references with the content beside them."""
    if schema is None or "text" in schema.names:
        return schema
    return schema.append(pa.field("text", pa.string()))


def fetch(options: argparse.Namespace) -> str:
    """Fetch and write; return a line about the result."""
    component, name = references_of(options)
    given = {key: value for key, value in vars(options).items() if key in FetchSettings.__dataclass_fields__}
    settings = FetchSettings(**given)
    settings.validate()
    if options.dry_run:
        rows = options.max_rows or component.subsets[name].published_rows
        amount = f"{rows:,} files, about {size(rows * _TYPICAL_FILE_BYTES)}" if rows else "an unknown number of files"
        return f"would fetch {amount} from addresses like {file_url(settings.url, _EXAMPLE)} to {options.output}"
    options.output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(options.output)
    stream = open_records(component, name)
    contents = CodeContents(stream, settings)
    done = write_shards(
        options.output,
        "code",
        contents,
        Progress(options.output / "progress.jsonl"),
        identity(stream.where, settings.url, settings.max_bytes, options.max_rows, options.rows_per_file),
        rows_per_file=options.rows_per_file,
        max_rows=options.max_rows,
        total_rows=component.subsets[name].published_rows,
        schema=with_text(stream.schema),
        counts=contents.counts,
    )
    licence = component.subsets[name].licence_column or "as each repository states it"
    source = {"name": "code", "from": stream.where, "url": settings.url, "licence": licence, "columns": stream.columns}
    write_manifest(options.output, {"kind": "records", "sources": [source | dict(done.counts)]}, done.files)
    parts = [f"{done.counts[key]:,} {key}" for key in ("fetched", "gone", "too_large", "not_utf8", "empty", "failed")]
    return f"{done.counts['references']:,} references: {', '.join(parts)}; {size(done.counts['bytes'])} in {options.output}"


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return the exit code: 0 done, 2 a mistake that one sentence explains."""
    defaults = FetchSettings()
    parser = argparse.ArgumentParser(prog="python -m data_prep.fetch_code", description="Fetch contents of code files.")
    parser.add_argument("--output", type=Path, required=True, help="folder for code-00000.parquet and so on")
    parser.add_argument("--component", default="nemotron_pretraining_code_v1")
    parser.add_argument("--input", action="append", default=[], help="files with references instead of the hub")
    parser.add_argument("--url", default=defaults.url, help="address with {repo}, {commit_id} and {rel_path}")
    parser.add_argument("--concurrency", type=int, default=defaults.concurrency)
    parser.add_argument("--attempts", type=int, default=defaults.attempts)
    parser.add_argument("--pause-seconds", type=float, default=defaults.pause_seconds)
    parser.add_argument("--timeout-seconds", type=float, default=defaults.timeout_seconds)
    parser.add_argument(
        "--max-bytes", type=int, default=defaults.max_bytes, help="larger files are counted and left out"
    )
    parser.add_argument("--max-failed", type=int, default=defaults.max_failed)
    parser.add_argument("--max-rows", type=int, default=0, help="files with content; 0 = all")
    parser.add_argument("--rows-per-file", type=int, default=5000)
    parser.add_argument("--dry-run", action="store_true", help="print what would be fetched, and about how much it is")
    options = parser.parse_args(arguments)
    return run(lambda: fetch(options))


if __name__ == "__main__":
    sys.exit(main())
