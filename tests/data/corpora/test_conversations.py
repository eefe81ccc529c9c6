import json

from nanotrain.data.corpora.conversations import (
    chitchat,
    chitchat_turns,
    english_questions,
    reasoned_exam_questions,
    tool_calls,
)
from nanotrain.data.wheels import WheelReader


def test_chat_turns_join_a_persons_messages(fake_wheels):
    with WheelReader(fake_wheels["chitchat-dataset"]) as reader:
        name, turns = next(chitchat_turns(reader))
        document = next(chitchat(reader))
    assert len(turns) == 6 and all(turn.endswith(". And then?") for turn in turns)
    assert document.family == f"chitchat:{name}"
    assert [line[:3] for line in document.text.splitlines()] == ["A: ", "B: "] * 3


def test_tool_calls_hold_the_gold_arguments_that_are_required(fake_wheels):
    with WheelReader(fake_wheels["bfcl-eval"]) as reader:
        documents = list(tool_calls(reader))
    for document in documents[:20]:
        tools, request, calls = (line.split(": ", 1)[1] for line in document.text.splitlines())
        name = json.loads(tools)[0]["name"]
        assert json.loads(calls) == [{"name": name, "arguments": {"a": int(name.split("_")[1])}}] and request
        assert document.family == f"bfcl:{name}"


def test_exam_questions_keep_the_argument(fake_wheels):
    with WheelReader(fake_wheels["lm-eval"]) as reader:
        documents = list(reasoned_exam_questions(reader))
    assert [d.family for d in documents] == [f"mmlu:law:{n}" for n in range(5)]  # the families of the translations
    for document in documents:
        assert document.text.startswith("Question: ") and document.text.endswith("The answer is (B).\n")
        assert "step by step" not in document.text


def test_english_topics_are_the_families_of_the_other_languages(fake_wheels):
    with WheelReader(fake_wheels["chatterbot-corpus"]) as reader:
        assert {d.family for d in english_questions(reader)} == {f"chatterbot:topic{n}" for n in range(12)}
