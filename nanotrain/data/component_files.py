"""Components to local files of records: which subsets, how large, and the writing itself."""

import json
from dataclasses import asdict
from pathlib import Path

from nanotrain.config.errors import UserError, nearest
from nanotrain.config.sources import ComponentConfig
from nanotrain.data.hub_records import expand_files, open_records
from nanotrain.data.manifest import write_manifest
from nanotrain.data.record_shards import ROWS_PER_FILE, identity, write_shards
from nanotrain.runtime.files import remove_leftovers
from nanotrain.runtime.progress import Progress

BYTES_PER_TOKEN = 4.0
"""For estimates only; tekken takes 3.0 (mathematics) to 4.0 (prose) bytes a token on our own text."""


def select_subsets(component: ComponentConfig, names: list[str]) -> list[str]:
    """Return the subsets asked for, in the component's order; none asked for = all.

    Raises:
        UserError: an unknown name.
    """
    for name in names:
        if name not in component.subsets:
            raise UserError(f"`{name}` is not a subset of {component.hub_id}; {nearest(name, component.subsets)}")
    return [name for name in component.subsets if not names or name in names]


def estimate(component: ComponentConfig, names: list[str]) -> list[tuple[str, str, int, int, float]]:
    """Return (subset, where from, rows, tokens, bytes of text) for a dry run; 0 where nothing is published.

    Local files are counted by their size on disk.
    """
    lines = []
    for name in names:
        subset = component.subsets[name]
        if subset.local_files:
            files = expand_files(subset.local_files, f"`subsets.{name}.local_files`")
            lines.append((name, f"{len(files)} local files", 0, 0, sum(Path(file).stat().st_size for file in files)))
        else:
            where = component.hub_id + (" (gated)" if component.gated else "")
            tokens = subset.published_tokens
            lines.append((name, where, subset.published_rows, tokens, tokens * BYTES_PER_TOKEN))
    return lines


def write_component(
    component: ComponentConfig,
    names: list[str],
    folder: Path,
    *,
    max_rows: int = 0,
    rows_per_file: int = ROWS_PER_FILE,
) -> dict[str, int]:
    """Write each subset to parquet files `folder/<subset>-00000.parquet` and a manifest; return subset -> rows.

    Raises:
        UserError: as `open_records` and `write_shards`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    progress = Progress(folder / "progress.jsonl")
    files, sources = [], []
    for name in names:
        stream = open_records(component, name)
        key = identity(json.loads(json.dumps(asdict(component.subsets[name]))), stream.where, max_rows, rows_per_file)
        done = write_shards(
            folder,
            name,
            stream,
            progress,
            key,
            rows_per_file=rows_per_file,
            max_rows=max_rows,
            total_rows=component.subsets[name].published_rows,
            schema=stream.schema,
        )
        files += done.files
        subset = component.subsets[name]
        sources.append(
            {"name": name, "from": stream.where, "hub_config": subset.hub_config, "split": subset.split}
            | {"licence": component.licence, "columns": stream.columns, "unverified": subset.unverified}
            | dict(done.counts)
        )
    write_manifest(folder, {"kind": "records", "sources": sources}, files)
    return {source["name"]: source["rows"] for source in sources}
