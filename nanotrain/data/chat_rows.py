"""Chat rows on disk, one JSON object a line, and as running text.

A row is `messages`, `task` (what `tasks.score` checks it by), `answer`, and `metadata` with the `family` that decides
its side of the split.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from nanotrain.config.errors import UserError
from nanotrain.data.documents import Document, decode_utf8
from nanotrain.runtime.files import write_bytes_atomic

Row = dict[str, Any]


def rows_as_documents(rows: list[Row], count: int) -> list[Document]:
    """Return the first `count` rows as running text for the sft category of pretraining."""
    documents = []
    for row in rows[:count]:
        parts = []
        for message in row["messages"]:
            if message["role"] == "user":
                parts.append(f"User: {message['content']}\n")
            elif "reasoning_content" in message:
                parts.append(f"Assistant: <think>\n{message['reasoning_content']}</think>\n\n{message['content']}\n")
            else:
                parts.append(f"Assistant: {message['content']}\n")
        documents.append(Document("".join(parts), row["metadata"]["family"], "chat-rows"))
    return documents


def count_tasks(rows: list[Row]) -> dict[str, int]:
    """Return the number of rows of each task."""
    return dict(sorted(Counter(row["task"] for row in rows).items()))


def save_rows(rows: list[Row], file: Path) -> None:
    """Write one JSON object a line."""
    lines = (json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows)
    write_bytes_atomic(file, ("\n".join(lines) + "\n").encode())


def load_rows(file: Path) -> list[Row]:
    """Read rows and check their form.

    Raises:
        UserError: not UTF-8, not JSON, or a row without a conversation that ends with the assistant.
    """
    rows = []
    for number, line in enumerate(decode_utf8(file.read_bytes(), str(file)).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            last = row["messages"][-1]
            valid = last["role"] == "assistant" and isinstance(row["task"], str)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"`{file}` line {number} is not a chat row ({error!r}); correct or remove it.") from None
        if not valid:
            raise UserError(f"`{file}` line {number} must end with an assistant message; correct or remove it.")
        rows.append(row)
    return rows
