import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.config.data import ReasoningConfig
from nanotrain.data.reasoning import cut_length, shape_rows
from nanotrain.data.tokenizer import load_tokenizer_json


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer_json(tokenizer_folder)


def rows_with(traced: int, plain: int, trace: str = "step one • ä\nstep two × 日本\nstep three\n" * 3) -> list[dict]:
    rows = []
    for number in range(traced + plain):
        reply = {"role": "assistant", "content": f"The answer is {number}."}
        if number < traced:
            reply["reasoning_content"] = f"{number}\n{trace}"
        messages = [{"role": "user", "content": f"q{number}"}, reply]
        rows.append({"messages": messages, "task": "t", "answer": str(number), "metadata": {"family": "f"}})
    return rows


@settings(max_examples=30, deadline=None)
@given(
    traced=st.integers(0, 120),
    plain=st.integers(0, 20),
    empty=st.floats(0, 1),
    cut=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_shares_are_exact_to_rounding(traced, plain, empty, cut, seed, tokenizer):
    rows = rows_with(traced, plain)
    config = ReasoningConfig(empty_trace_fraction=empty, truncated_fraction=cut)
    shaped = shape_rows(rows, config, tokenizer, seed)
    shapes = Counter(row["metadata"].get("shape", "whole") for row in shaped)
    assert shapes["empty_trace"] == round(empty * traced)
    assert shapes["truncated"] == round(cut * traced)
    assert len(shaped) == len(rows) + round(empty * traced)
    assert rows == rows_with(traced, plain)  # the input is not changed


def test_published_shares_over_the_quickstarts_rows(tokenizer):
    shaped = shape_rows(rows_with(1000, 40), ReasoningConfig(), tokenizer, 1)
    shapes = Counter(row["metadata"].get("shape", "whole") for row in shaped)
    assert shapes == {"whole": 990, "truncated": 50, "empty_trace": 100}


def test_shapes_keep_prompt_and_answer(tokenizer):
    rows = rows_with(100, 0)
    config = ReasoningConfig(empty_trace_fraction=0.5, truncated_fraction=0.5)
    originals = {row["answer"]: row for row in rows}
    cuts = set()
    for row in shape_rows(rows, config, tokenizer, 3):
        original = originals[row["answer"]]
        assert row["messages"][0] == original["messages"][0]
        reply, full = row["messages"][-1], original["messages"][-1]
        assert reply["content"] == full["content"]
        shape = row["metadata"].get("shape")
        if shape == "empty_trace":
            assert "reasoning_content" not in reply
        elif shape == "truncated":
            trace, whole = reply["reasoning_content"], full["reasoning_content"]
            assert whole.startswith(trace) and 0 < len(trace) < len(whole)
            total, kept = len(tokenizer.encode(whole).ids), len(tokenizer.encode(trace).ids)
            assert 0.2 * total <= kept <= 0.8 * total  # 25-75% of the tokens, re-encoded
            cuts.add(round(kept / total, 2))
        else:
            assert reply == full
    assert len(cuts) > 10


def test_the_choice_depends_on_the_seed_alone(tokenizer):
    rows, config = rows_with(200, 10), ReasoningConfig()
    assert shape_rows(rows, config, tokenizer, 5) == shape_rows(rows, config, tokenizer, 5)
    assert shape_rows(rows, config, tokenizer, 5) != shape_rows(rows, config, tokenizer, 6)


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(3, 5000), seed=st.integers())
def test_cuts_fall_in_the_range_that_applies(tokens, seed):
    config = ReasoningConfig(truncated_min_tokens=1000, truncated_max_tokens=2000)
    kept = cut_length(tokens, config, random.Random(seed))
    assert 1 <= kept < tokens
    if tokens > 1000:
        assert 1000 <= kept <= 2000
    else:
        assert round(0.25 * tokens) <= kept <= round(0.75 * tokens) or tokens <= 4


def test_cuts_are_uniform():
    config = ReasoningConfig(truncated_min_tokens=10, truncated_max_tokens=19)
    counts = Counter(cut_length(500, config, random.Random(i)) for i in range(5000))
    assert sorted(counts) == list(range(10, 20)) and all(400 < count < 600 for count in counts.values())
    short = Counter(cut_length(8, ReasoningConfig(), random.Random(i)) for i in range(2000))
    assert sorted(short) == [2, 3, 4, 5, 6]


def test_a_trace_of_one_or_two_tokens_stays_whole(tokenizer):
    rows = rows_with(4, 0)
    for row in rows:
        row["messages"][-1]["reasoning_content"] = "x"
    config = ReasoningConfig(empty_trace_fraction=0.0, truncated_fraction=1.0)
    assert shape_rows(rows, config, tokenizer, 1) == rows
