"""Shapes training rows for thinking control: some prompts again without a trace, some traces cut short.

The paper (section 3) repeats about a tenth of the prompts with the reasoning stripped, and cuts the traces of some five
percent of the rows abruptly, keeping the final answer, so that a budget can end a trace at inference. Where the cut
falls in a trace shorter than the published 1-2k tokens is our choice: uniformly at 25-75% of it.
"""

import random
from typing import Any

from tokenizers import Tokenizer

from nanotrain.config.data import ReasoningConfig
from nanotrain.data.chat import is_thinking
from nanotrain.data.permutation import derive_key

_SHORT_CUT_LOW, _SHORT_CUT_HIGH = 0.25, 0.75
_MIN_CUT_TOKENS = 3
"""A trace shorter than this has no inner place to cut."""

Row = dict[str, Any]


def _selected(candidates: list[int], fraction: float, seed: int, purpose: str) -> set[int]:
    """Return round(fraction x number) of the row numbers; which ones depends on (seed, row number) only."""
    count = round(fraction * len(candidates))
    return set(sorted(candidates, key=lambda row: (derive_key(purpose, seed, row), row))[:count])


def cut_length(num_tokens: int, config: ReasoningConfig, draw: random.Random) -> int:
    """Return how many of a trace's tokens are kept, uniform in the range that applies to its length."""
    if num_tokens > config.truncated_min_tokens:
        return draw.randint(config.truncated_min_tokens, min(config.truncated_max_tokens, num_tokens - 1))
    low = max(1, round(_SHORT_CUT_LOW * num_tokens))
    return draw.randint(low, max(low, min(round(_SHORT_CUT_HIGH * num_tokens), num_tokens - 1)))


def _with_last(row: Row, reply: dict[str, Any], shape: str) -> Row:
    return row | {"messages": [*row["messages"][:-1], reply], "metadata": row["metadata"] | {"shape": shape}}


def without_trace(row: Row) -> Row:
    """Return the row with an empty trace: reasoning off."""
    reply = {key: value for key, value in row["messages"][-1].items() if key != "reasoning_content"}
    return _with_last(row, reply, "empty_trace")


def shape_rows(rows: list[Row], config: ReasoningConfig, tokenizer: Tokenizer, seed: int) -> list[Row]:
    """Return the rows, some with a cut trace, followed by the repeated prompts with an empty one.

    `metadata.shape` of a changed row says `truncated` or `empty_trace`. Shares are exact to rounding: of the rows that
    have traces, `truncated_fraction` are cut and `empty_trace_fraction` are repeated.
    """
    reasoned = [number for number, row in enumerate(rows) if is_thinking(row["messages"])]
    truncated = sorted(_selected(reasoned, config.truncated_fraction, seed, "truncate"))
    repeated = sorted(_selected(reasoned, config.empty_trace_fraction, seed, "empty"))
    shaped = list(rows)
    traces = [rows[number]["messages"][-1]["reasoning_content"] for number in truncated]
    encodings = tokenizer.encode_batch(traces, add_special_tokens=False)
    for number, trace, encoding in zip(truncated, traces, encodings, strict=True):
        if len(encoding.ids) < _MIN_CUT_TOKENS:
            continue
        kept = cut_length(len(encoding.ids), config, random.Random(derive_key("cut", seed, number)))
        reply = rows[number]["messages"][-1] | {"reasoning_content": trace[: encoding.offsets[kept - 1][1]]}
        shaped[number] = _with_last(rows[number], reply, "truncated")
    return shaped + [without_trace(rows[number]) for number in repeated]
