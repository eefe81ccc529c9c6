"""Conversations of released post-training sets as our chat rows: the trace apart from the answer, tool calls kept.

A trace that stands between think tags in the assistant's text, or in a field of its own, becomes `reasoning_content`;
earlier turns lose theirs, as the chat format does. What cannot be trained on is counted by reason and left out.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from nanotrain.data.documents import unit_hash
from nanotrain.data.record_shards import Record, RecordSource, State

_TRACE = re.compile(r"\A\s*<think>(.*?)</think>\s*(.*)\Z", re.S)
_CONTROL = re.compile("[\x02\x03]")
_ROLES = ("system", "user", "assistant", "tool")
_KEPT_COLUMNS = ("uuid", "category", "generator", "version", "reasoning")
SKIPPED = ("empty_prompt", "no_reply", "empty_reply", "unclosed_trace", "unknown_role", "control_character")
"""Reasons for which a record is left out."""


class Skip(Exception):
    """A record that cannot be trained on; the message is one of `SKIPPED`."""


def split_trace(content: str) -> tuple[str, str]:
    """Return (trace, answer) of an assistant's text; the trace ends with a newline, or is empty.

    Raises:
        Skip: a trace is opened and never closed, so there is no answer.
    """
    match = _TRACE.match(content)
    if match:
        trace = match[1].strip("\n ")
        return (f"{trace}\n" if trace else ""), match[2]
    if content.lstrip().startswith("<think>"):
        raise Skip("unclosed_trace")
    return "", content


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """Return the calls as {"name", "arguments"}; a list, or JSON text of one; arguments stay as they are written."""
    if isinstance(calls, str):
        calls = json.loads(calls) if calls.strip() else []
    kept = []
    for call in calls or []:
        function = call["function"] if call.get("function") else call
        kept.append({"name": function["name"], "arguments": function["arguments"]})
    return kept


def _message(message: Mapping[str, Any], is_last: bool) -> dict[str, Any]:
    role, content = message["role"], message["content"] or ""
    if role not in _ROLES:
        raise Skip("unknown_role")
    if _CONTROL.search(content):
        raise Skip("control_character")
    if role != "assistant":
        return {"role": role, "content": content}
    trace, answer = split_trace(content)
    own_trace = message["reasoning_content"] if "reasoning_content" in message else None
    if own_trace and own_trace.strip():
        trace = own_trace.strip("\n ") + "\n"
    converted: dict[str, Any] = {"role": role, "content": answer.strip() if trace else answer}
    calls = _tool_calls(message["tool_calls"]) if "tool_calls" in message else []
    if calls:
        converted["tool_calls"] = calls
    if is_last and trace:
        converted["reasoning_content"] = trace
    if is_last and not answer.strip() and not calls:
        raise Skip("empty_reply")
    return converted


def _tools(metadata: Any) -> list[Any]:
    """Return the tools that a record's metadata lists; metadata is a mapping or JSON text, and may be neither."""
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            return []
    tools = metadata["tools"] if isinstance(metadata, dict) and "tools" in metadata else []
    if isinstance(tools, str):
        tools = json.loads(tools) if tools.strip().startswith("[") else []
    return tools if isinstance(tools, list) else []


def chat_row(record: Record, messages_column: str, licence: str, prompts: Mapping[str, str]) -> dict[str, Any]:
    """Return a record as a chat row.

    Args:
        record: one conversation.
        messages_column: list of {role, content, tool_calls}.
        licence: of the record.
        prompts: uuid -> prompt, for records that were released without theirs.

    Raises:
        Skip: it cannot be trained on.
    """
    given = [dict(message) for message in record[messages_column]]
    first_user = next((message for message in given if message["role"] == "user"), None)
    if first_user is not None and not (first_user["content"] or "").strip():
        uuid = record["uuid"] if "uuid" in record else None
        if uuid not in prompts:
            raise Skip("empty_prompt")
        first_user["content"] = prompts[uuid]
    if first_user is None:
        raise Skip("empty_prompt")
    if given[-1]["role"] != "assistant":
        raise Skip("no_reply")
    messages = [_message(message, number == len(given) - 1) for number, message in enumerate(given)]
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    metadata = {name: record[name] for name in _KEPT_COLUMNS if record.get(name)}
    metadata |= {"licence": licence, "family": f"prompt:{unit_hash(first_user['content'], 'prompt'):.15f}"}
    tools = _tools(record["metadata"]) if "metadata" in record else []
    if tools:
        metadata["tools"] = tools
    return {"messages": messages, "task": "chat", "answer": "", "metadata": metadata}


class ChatRecords:
    """Conversations in, chat rows out as {"row": JSON, "held_out": bool}; a source for `record_shards.write_shards`.

    Args:
        source: the conversations.
        messages_column: where they stand.
        licence: column of each record's licence, or the licence itself.
        validation_fraction: share of prompts held out; a prompt is on one side with all its answers.
        prompts: uuid -> prompt.
    """

    def __init__(
        self,
        source: RecordSource,
        messages_column: str,
        *,
        licence_column: str,
        licence: str,
        validation_fraction: float,
        prompts: Mapping[str, str],
    ) -> None:
        self._source, self._column = source, messages_column
        self._licence_column, self._licence = licence_column, licence
        self._fraction, self._prompts = validation_fraction, prompts
        self._state: State = {}
        self.counts: Counter[str] = Counter()
        """records, with_trace, with_tool_calls, held_out, and the reasons of `SKIPPED`."""

    def state(self) -> State:
        """Return the state of the source."""
        return self._state or self._source.state()

    def records(self, state: State | None = None) -> Iterator[Record]:
        """Yield the rows, all or those after `state`."""
        for record in self._source.records(state):
            self._state = self._source.state()
            self.counts["records"] += 1
            licence = record[self._licence_column] if self._licence_column else ""
            try:
                row = chat_row(record, self._column, licence or self._licence, self._prompts)
            except Skip as reason:
                self.counts[str(reason)] += 1
                continue
            held_out = unit_hash(row["metadata"]["family"], "split") < self._fraction
            reply = row["messages"][-1]
            self.counts.update({"with_trace": "reasoning_content" in reply, "held_out": held_out})
            self.counts["with_tool_calls"] += any("tool_calls" in message for message in row["messages"])
            yield {"row": json.dumps(row, ensure_ascii=False, sort_keys=True), "held_out": held_out}
