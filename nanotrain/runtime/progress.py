"""Finished work items of a stage that does not train, so that a kill costs at most one item.

One JSON line an item, appended and fsynced; a line cut off by a kill is dropped on the next read.
"""

import json
import os
from pathlib import Path
from typing import Any


class Progress:
    """An append-only journal of (key, value) pairs; the value is any JSON value."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._items: dict[str, Any] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            whole = file.read_bytes()
            complete = whole[: whole.rfind(b"\n") + 1]
            if complete != whole:
                with open(file, "r+b") as handle:
                    handle.truncate(len(complete))
            for line in complete.splitlines():
                item = json.loads(line)
                self._items[item["key"]] = item["value"]

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def record(self, key: str, value: Any) -> Any:
        """Append one finished item and return its value as it will be read back."""
        line = json.dumps({"key": key, "value": value})
        with open(self._file, "a", encoding="utf-8") as handle:
            handle.write(line + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self._items[key] = json.loads(line)["value"]
        return self._items[key]
