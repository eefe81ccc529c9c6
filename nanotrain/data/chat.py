"""Nemotron Nano 2's chat format: messages to text, and text to token ids with a loss mask.

The jinja template beside this file is the one description of the format; it is saved into every tokenizer folder. It
marks what an assistant writes with `generation` blocks, so the loss mask follows from character positions that the
template itself gives, never from counting tokens.

Messages are dicts with `role` (system, user, assistant, tool) and `content`; an assistant may carry
`reasoning_content`, emitted verbatim between `<think>\\n` and `</think>` (a finished trace ends with a newline, one
that was cut off need not), and `tool_calls`.
"""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from nanotrain.config.errors import UserError

THINK_OPEN = "<think>\n"
THINK_CLOSE = "</think>"
THINK_EMPTY = "<think></think>"
TURN_END = "<SPECIAL_12>"
_TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")
_OPEN, _CLOSE = "\x02", "\x03"  # mark generated text while rendering; no text may hold them
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")

Message = dict[str, Any]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` in the template: the text inside is put between two marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own form

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


@functools.cache
def _template():
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(_TEMPLATE_FILE.read_text(encoding="utf-8"))


def portable_template() -> str:
    """Return the template without `generation` marks, which only some readers of chat templates know."""
    return re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}\s*", "", _TEMPLATE_FILE.read_text(encoding="utf-8"))


def _render_marked(
    messages: Sequence[Message], add_generation_prompt: bool, thinking: bool | None, tools: Sequence[dict] | None
) -> str:
    for message in messages:
        for key in ("content", "reasoning_content"):
            if key in message and isinstance(message[key], str) and _MARKS.search(message[key]):
                raise UserError(f"a chat message's {key} holds a control character (U+0002 or U+0003); remove it.")
    return _template().render(
        messages=list(messages), add_generation_prompt=add_generation_prompt, enable_thinking=thinking, tools=tools
    )


def render(
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    thinking: bool | None = None,
    tools: Sequence[dict] | None = None,
) -> str:
    """Return the conversation as the model reads it.

    Args:
        messages: the conversation.
        add_generation_prompt: open an assistant turn at the end; with an assistant message last, leave it open.
        thinking: True opens `<think>`, False opens and shuts it; None lets the flags /think and /no_think in the
            messages decide, thinking by default.
        tools: JSON schemas of callable tools.
    """
    return _MARKS.sub("", _render_marked(messages, add_generation_prompt, thinking, tools))


def _pieces(marked: str) -> list[tuple[str, bool]]:
    """Return the text in pieces (text, is trained), cut wherever inference starts or resumes from given tokens.

    A byte-level BPE would otherwise join characters across such a place (`>` and `\\n\\n`) into a token that a model
    which continues from `</think>` can never produce.
    """
    pieces: list[tuple[str, bool]] = []
    for number, part in enumerate(_MARKS.split(marked)):
        trained = number % 2 == 1
        if not trained:
            pieces.append((part, False))
            continue
        for opening in (THINK_EMPTY, THINK_OPEN):
            if part.startswith(opening):
                pieces.append((opening, True))
                part = part.removeprefix(opening)
                break
        for fragment in re.split(f"({re.escape(THINK_CLOSE)})", part):
            pieces.append((fragment, True))
    return [piece for piece in pieces if piece[0]]


def is_thinking(messages: Sequence[Message]) -> bool:
    """Return whether a training conversation's last turn has a reasoning trace."""
    return bool("reasoning_content" in messages[-1] and messages[-1]["reasoning_content"])


def encode_rows(rows: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (ids [n] int32, is trained [n] bool) of each training row.

    Trained is what the assistant writes: the opening `<think>`, the trace, the answer, and the end marker. System, user
    and tool turns and the three prefix tokens of the assistant's turn are not.

    Args:
        rows: dicts with `messages` and optionally `metadata.tools`.
        tokenizer: of the tokenizer folder.
    """
    split = []
    for row in rows:
        messages = row["messages"]
        tools = row["metadata"]["tools"] if "metadata" in row and "tools" in row["metadata"] else None
        split.append(_pieces(_render_marked(messages, False, is_thinking(messages), tools)))
    texts = sorted({text for pieces in split for text, _ in pieces})
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
    encoded = []
    for pieces in split:
        tokens = [token for text, _ in pieces for token in ids[text]]
        mask = [trained for text, trained in pieces for _ in ids[text]]
        encoded.append((np.asarray(tokens, np.int32), np.asarray(mask, bool)))
    return encoded


def encode(
    messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[dict] | None = None
) -> tuple[list[int], list[bool]]:
    """Return (ids, loss mask) of one training conversation; see `encode_rows`."""
    row = {"messages": list(messages), "metadata": {"tools": list(tools)} if tools else {}}
    ids, mask = encode_rows([row], tokenizer)[0]
    return ids.tolist(), mask.tolist()
