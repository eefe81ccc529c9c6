"""Shapes chat rows with reasoning traces for SFT: some prompts repeated without a trace, some traces cut off.

The paper gives the shares (about 10% and 5%) and the lengths (1-2k tokens, final answer kept), not the exact forms: an
empty trace is what the chat template emits for reasoning off, and a cut falls wherever the token count says.
Which rows are taken depends on (seed, row number) only.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nanotrain.config.data import ReasoningConfig
from nanotrain.data.permutation import derive_key, permuted_index

Row = dict[str, Any]
SHORT_TRACE_SHARES = (0.25, 0.75)
"""Traces no longer than `truncated_min_tokens` are cut uniformly between these shares of their length."""


@dataclass(frozen=True)
class ShapedRows:
    """Rows for training, and how many of them were shaped."""

    rows: list[Row]
    truncated_rows: int
    empty_trace_rows: int


def trace_of(row: Row) -> str:
    """Return the reasoning trace of a row's last turn, empty when it has none."""
    last = row["messages"][-1]
    return last["reasoning_content"] if last.get("reasoning_content") else ""


def with_trace(row: Row, trace: str) -> Row:
    """Return a copy of a row with another trace in its last turn; an empty trace is left out."""
    last = {key: value for key, value in row["messages"][-1].items() if key != "reasoning_content"}
    if trace:
        last["reasoning_content"] = trace
    return {**row, "messages": [*row["messages"][:-1], last]}


def shape_rows(rows: list[Row], config: ReasoningConfig, tokenizer: Tokenizer, seed: int) -> ShapedRows:
    """Truncate a share of the traces and repeat a share of the prompts with an empty trace.

    Args:
        rows: as in chat/train.jsonl; rows without a trace stay as they are.
        config: shares and lengths.
        tokenizer: counts the trace's tokens.
        seed: of the run.

    Returns:
        The rows in their order, the repeated prompts behind them. Shares are of the rows that have traces, rounded to
        the nearest row.
    """
    traced = [number for number, row in enumerate(rows) if trace_of(row)]
    truncated = _choose(traced, config.truncated_fraction, derive_key("truncated", seed))
    emptied = _choose(traced, config.empty_trace_fraction, derive_key("empty", seed))
    shaped = list(rows)
    for number in truncated:
        cut = _cut(trace_of(rows[number]), config, tokenizer, derive_key("cut", seed, number))
        shaped[number] = with_trace(rows[number], cut)
    shaped += [with_trace(rows[number], "") for number in emptied]
    return ShapedRows(shaped, len(truncated), len(emptied))


def _choose(numbers: list[int], share: float, key: int) -> list[int]:
    count = round(share * len(numbers))
    return sorted(numbers[permuted_index(place, len(numbers), key)] for place in range(count))


def _cut(trace: str, config: ReasoningConfig, tokenizer: Tokenizer, key: int) -> str:
    """Return the start of a trace; at least one token is kept and one is lost, unless it has only one."""
    encoding = tokenizer.encode(trace, add_special_tokens=False)
    length = len(encoding.ids)
    random = np.random.default_rng(key)
    if length <= config.truncated_min_tokens:
        low, high = (share * length for share in SHORT_TRACE_SHARES)
        kept = round(random.uniform(low, high))
    else:
        kept = int(random.integers(config.truncated_min_tokens, min(config.truncated_max_tokens, length - 1) + 1))
    kept = min(max(kept, 1), max(length - 1, 1))
    return trace[: encoding.offsets[kept - 1][1]]
