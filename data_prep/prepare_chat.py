"""Conversations of released sets to a data folder for fine-tuning: chat/train.jsonl and chat/validation.jsonl.

    python -m data_prep.prepare_chat --component nemotron_post_training_dataset_v2 --tokenizer FOLDER --output FOLDER [--dry-run]

Traces are split from think tags, tool calls are kept, and what cannot be trained on (empty prompts, traces never closed) is
counted. `--prompts FILE` fills empty prompts in: records with `uuid` and `prompt`. Stopped at any moment, the same command
goes on and ends in the same bytes.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.program import run
from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.config.sources import ComponentConfig, RecordForm, load_component
from nanotrain.data.chat_sources import SKIPPED, ChatRecords
from nanotrain.data.component_files import select_subsets
from nanotrain.data.hub_records import LocalRecords, open_records
from nanotrain.data.manifest import write_manifest
from nanotrain.data.record_shards import ROWS_PER_FILE, ShardSet, identity, write_shards
from nanotrain.runtime.files import file_digest, fsync_folder, remove_leftovers
from nanotrain.runtime.progress import Progress

_SCHEMA = pa.schema([("row", pa.string()), ("held_out", pa.bool_())])


def component_of(options: argparse.Namespace) -> tuple[ComponentConfig, list[str]]:
    """Return the component and the subsets to convert."""
    component = load_component(options.component)
    names = select_subsets(component, options.subset)
    for name in names:
        if component.subsets[name].form is not RecordForm.messages:
            raise UserError(f"`{name}` of {component.hub_id} holds no conversations (its form is not `messages`).")
    if options.input:
        if len(names) != 1:
            raise UserError(
                f"`--input` replaces one subset's files, but {len(names)} are selected; add `--subset NAME`."
            )
        component.subsets[names[0]].local_files = options.input
    return component, names


def load_prompts(files: list[str]) -> dict[str, str]:
    """Return uuid -> prompt of files of records."""
    if not files:
        return {}
    return {
        record["uuid"]: record["prompt"] for record in LocalRecords(files, "`--prompts`", ("uuid", "prompt")).records()
    }


def prepare(options: argparse.Namespace) -> str:
    """Convert and write; return a line about the result."""
    component, names = component_of(options)
    if not 0 <= options.validation_fraction < 0.5:
        raise UserError(f"`--validation-fraction` ({options.validation_fraction}) must lie between 0 and 0.5.")
    if options.dry_run:
        rows = {name: options.max_rows or component.subsets[name].published_rows for name in names}
        lines = [
            f"{name:<32} {count:>14,} rows" if count else f"{name:<32} rows unknown" for name, count in rows.items()
        ]
        return "\n".join(
            [*lines, f"{sum(rows.values()):,} rows to {options.output}/chat; licence: {component.licence}"]
        )
    if not (options.tokenizer / "tokenizer.json").is_file():
        raise MissingInputError(
            f"`{options.tokenizer}/tokenizer.json` is missing; `--tokenizer` names a tokenizer folder."
        )
    work = options.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    for folder in (options.output, work, options.output / "chat"):
        remove_leftovers(folder)
    progress, prompts = Progress(options.output / "progress.jsonl"), load_prompts(options.prompts)
    parts, sources = [], []
    for name in names:
        done, where = _convert(component, name, work, progress, prompts, options)
        parts += [work / file for file in done.files]
        counts = {
            key: done.counts[key] for key in ("records", "rows", "with_trace", "with_tool_calls", "held_out", *SKIPPED)
        }
        sources.append({"name": name, "from": where, "licence": component.licence, **counts})
    totals = {
        key: sum(source[key] for source in sources) for key in ("records", "rows", "with_trace", "held_out", *SKIPPED)
    }
    if not totals["rows"]:
        raise UserError(
            f"none of the {totals['records']:,} records can be trained on; see the counts in {options.output}."
        )
    files = _finish(parts, options)
    chat = {"train_rows": totals["rows"] - totals["held_out"], "validation_rows": totals["held_out"]}
    digest = file_digest(options.tokenizer / "tokenizer.json")
    write_manifest(
        options.output, {"kind": "chat", "tokenizer_digest": digest, "sources": sources, "chat": chat}, files
    )
    skipped = ", ".join(f"{totals[key]:,} {key}" for key in SKIPPED if totals[key]) or "none"
    return (
        f"{totals['rows']:,} of {totals['records']:,} rows, {totals['with_trace']:,} with a trace; left out: {skipped}"
    )


def _convert(
    component: ComponentConfig,
    name: str,
    work: Path,
    progress: Progress,
    prompts: dict[str, str],
    options: argparse.Namespace,
) -> tuple[ShardSet, str]:
    stream, subset = open_records(component, name), component.subsets[name]
    records = ChatRecords(
        stream,
        subset.messages_column,
        licence_column=subset.licence_column,
        licence=component.licence,
        validation_fraction=options.validation_fraction,
        prompts=prompts,
    )
    settings = (stream.where, json.loads(json.dumps(asdict(subset))), options.validation_fraction, options.max_rows)
    return write_shards(
        work,
        name,
        records,
        progress,
        identity(*settings, prompts, options.rows_per_file),
        rows_per_file=options.rows_per_file,
        max_rows=options.max_rows,
        total_rows=subset.published_rows,
        schema=_SCHEMA,
        counts=records.counts,
    ), stream.where


def _rows(parts: list[Path]) -> Iterator[tuple[str, bool]]:
    for part in parts:
        for batch in pq.ParquetFile(part).iter_batches(1024):
            yield from zip(batch["row"].to_pylist(), batch["held_out"].to_pylist(), strict=True)


def _finish(parts: list[Path], options: argparse.Namespace) -> list[str]:
    """Write the two files and the tokenizer; return the names for the manifest."""
    folder = options.output / "chat"
    folder.mkdir(exist_ok=True)
    for name, wanted in (("train", False), ("validation", True)):
        temporary = folder / f".{name}.jsonl.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as handle:
            for row, held_out in _rows(parts):
                if held_out == wanted:
                    handle.write(row + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, folder / f"{name}.jsonl")
    fsync_folder(folder)
    tokenizer = options.output / "tokenizer"
    shutil.copytree(options.tokenizer, tokenizer, dirs_exist_ok=True)
    names = sorted(file.relative_to(options.output).as_posix() for file in tokenizer.rglob("*") if file.is_file())
    return [*names, "chat/train.jsonl", "chat/validation.jsonl"]


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return the exit code: 0 done, 2 a mistake that one sentence explains."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.prepare_chat", description="Conversations to chat rows.")
    parser.add_argument("--component", default="nemotron_post_training_dataset_v2", help="name, or a component's file")
    parser.add_argument("--subset", action="append", default=[], help="only this subset; may be repeated")
    parser.add_argument("--input", action="append", default=[], help="local files of one subset instead of the hub")
    parser.add_argument(
        "--prompts", action="append", default=[], help="records with uuid and prompt, for empty prompts"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder of the model to be trained")
    parser.add_argument("--output", type=Path, required=True, help="data folder")
    parser.add_argument("--validation-fraction", type=float, default=0.01, help="share of prompts held out")
    parser.add_argument("--max-rows", type=int, default=0, help="first rows of each subset; 0 = all")
    parser.add_argument("--rows-per-file", type=int, default=ROWS_PER_FILE)
    parser.add_argument("--dry-run", action="store_true", help="print what would be read, and how large it is")
    options = parser.parse_args(arguments)
    return run(lambda: prepare(options))


if __name__ == "__main__":
    sys.exit(main())
