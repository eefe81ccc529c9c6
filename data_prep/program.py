"""What the programs share: one sentence and exit code 2 for a user's mistake, and the table of a dry run."""

import logging
import sys
from collections.abc import Callable

from nanotrain.config.errors import UserError


def run(work: Callable[[], str]) -> int:
    """Do the work and print the line that it returns; return the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for noisy in ("httpx", "datasets", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        print(work())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def size(num_bytes: float) -> str:
    """Return bytes in a readable unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
