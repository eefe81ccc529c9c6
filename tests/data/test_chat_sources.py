import json

import pytest

from nanotrain.data.chat import render
from nanotrain.data.chat_sources import SKIPPED, ChatRecords, Skip, chat_row, split_trace
from tests.data.sources import ListSource


def record(*messages, uuid="u", **columns):
    turns = [{"role": role, "content": content, "tool_calls": []} for role, content in messages]
    return {"uuid": uuid, "license": "CC-BY-4.0", "category": "math", "reasoning": "on", "messages": turns} | columns


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>\nstep 1\nstep 2\n</think>\n\nThe answer", ("step 1\nstep 2\n", "The answer")),
        ("<think>step</think>x </think> y", ("step\n", "x </think> y")),
        ("  <think>\n\n</think>\n\nplain", ("", "plain")),
        ("no tags <think> here", ("", "no tags <think> here")),
        ("", ("", "")),
    ],
)
def test_traces_are_split_from_the_answer(content, expected):
    assert split_trace(content) == expected


def test_a_row_renders_in_the_chat_format_with_its_trace():
    given = record(("system", ""), ("user", "2+2?"), ("assistant", "<think>\nfour\n</think>\n\n4"))
    row = chat_row(given, "messages", "CC-BY-4.0", {})
    assert row["messages"] == [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "four\n"},
    ]
    assert row["metadata"]["licence"] == "CC-BY-4.0" and row["metadata"]["category"] == "math"
    assert "<think>\nfour\n</think>\n\n4" in render(row["messages"], add_generation_prompt=False, thinking=True)


def test_earlier_turns_lose_their_trace_and_tools_are_kept():
    call = {"id": "1", "type": "function", "function": {"name": "area", "arguments": '{"r": 2}'}}
    given = record(
        ("user", "q"), ("assistant", "<think>x</think>calling"), ("tool", "12.6"), ("assistant", "<think>y</think>12.6")
    )
    given["messages"][1]["tool_calls"] = [call]
    given["metadata"] = json.dumps({"tools": [{"name": "area", "parameters": {}}]})
    row = chat_row(given, "messages", "x", {})
    assert row["messages"][1] == {
        "role": "assistant",
        "content": "calling",
        "tool_calls": [{"name": "area", "arguments": '{"r": 2}'}],
    }
    assert row["metadata"]["tools"] == [{"name": "area", "parameters": {}}]
    text = render(row["messages"], add_generation_prompt=False, thinking=True, tools=row["metadata"]["tools"])
    assert '<TOOLCALL>[{"name": "area", "arguments": {"r": 2}}]</TOOLCALL>' in text


def test_a_field_of_its_own_counts_as_the_trace():
    given = record(("user", "q"), ("assistant", "4"))
    given["messages"][1]["reasoning_content"] = "four"
    assert chat_row(given, "messages", "x", {})["messages"][1]["reasoning_content"] == "four\n"


BROKEN = {
    "empty_prompt": record(("user", " "), ("assistant", "a"), uuid="e"),
    "no_reply": record(("user", "q")),
    "empty_reply": record(("user", "q"), ("assistant", "<think>t</think> ")),
    "unclosed_trace": record(("user", "q"), ("assistant", "<think>on and on")),
    "unknown_role": record(("user", "q"), ("judge", "x"), ("assistant", "a")),
    "control_character": record(("user", "q\x02"), ("assistant", "a")),
}


def test_what_cannot_be_trained_on_is_counted_by_reason():
    assert set(BROKEN) == set(SKIPPED)
    for reason, given in BROKEN.items():
        with pytest.raises(Skip, match=reason):
            chat_row(given, "messages", "x", {})
    good = [record(("user", f"q{n}"), ("assistant", f"<think>t</think>{n}")) for n in range(40)]
    source = ChatRecords(
        ListSource([*BROKEN.values(), *good]), "messages", licence_column="license", licence="", validation_fraction=0.3, prompts={}
    )  # fmt: skip
    rows = list(source.records())
    assert {key: source.counts[key] for key in SKIPPED} == dict.fromkeys(SKIPPED, 1)
    assert (len(rows), source.counts["records"], source.counts["with_trace"]) == (40, 46, 40)
    assert 0 < source.counts["held_out"] < 40


def test_an_empty_prompt_can_be_filled_in():
    row = chat_row(BROKEN["empty_prompt"], "messages", "x", {"e": "the question"})
    assert row["messages"][0]["content"] == "the question"


def test_all_answers_to_a_prompt_are_on_one_side():
    rows = [record(("user", f"q{n // 3}"), ("assistant", str(n))) for n in range(60)]
    source = ChatRecords(
        ListSource(rows), "messages", licence_column="", licence="x", validation_fraction=0.4, prompts={}
    )
    sides = {}
    for row in source.records():
        content = json.loads(row["row"])
        sides.setdefault(content["messages"][0]["content"], set()).add(row["held_out"])
    assert all(len(side) == 1 for side in sides.values()) and len(sides) == 20
    assert {True} in sides.values() and {False} in sides.values()
