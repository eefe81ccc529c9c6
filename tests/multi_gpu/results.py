"""Rows of a run on several GPUs: one JSON line each, written at once, because a later failure must not lose it."""

import json
from pathlib import Path

from nanotrain.runtime.distributed import current_world


class Results:
    """Where the first rank writes what it measured; the other ranks write nothing."""

    def __init__(self, path: Path | None) -> None:
        """Args: path: JSON-lines file to append to; None only prints."""
        self._path = path if current_world().is_first else None
        self._prints = current_world().is_first

    def row(self, part: str, name: str, **values: object) -> None:
        """Append one row: which part, which case of it, and its numbers."""
        line = json.dumps({"part": part, "name": name, **values})
        if self._prints:
            print(line, flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
