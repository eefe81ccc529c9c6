"""Text of the sft category: crowd-sourced chat, questions and answers, tool calls, exam questions reasoned through."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from nanotrain.data.corpora.translations import load_yaml
from nanotrain.data.documents import Document
from nanotrain.data.wheels import WheelReader

_BFCL = ("simple_python", "multiple", "parallel")
_COT_ITEM = re.compile(r"Q: (.*?)\nA: Let's think step by step\. (.*?)(?=\n\nQ: |\Z)", re.S)
_SHORTEST_CHAT_CHARACTERS = 200
_SPACES = re.compile(r"\s+")


def chitchat_turns(reader: WheelReader) -> Iterator[tuple[str, list[str]]]:
    """Yield (conversation id, turns); successive messages of one person are one turn."""
    content = json.loads(reader.read_text("chitchat_dataset/dataset.json"))
    for name, conversation in sorted(content.items()):
        turns = [
            _SPACES.sub(" ", " ".join(message["text"] for message in messages)).strip()
            for messages in conversation["messages"]
        ]
        turns = [turn for turn in turns if turn]
        if sum(map(len, turns)) >= _SHORTEST_CHAT_CHARACTERS:
            yield name, turns


def chitchat(reader: WheelReader) -> Iterator[Document]:
    """Yield conversations between two strangers, with speakers in turn; the family is the conversation."""
    for name, turns in chitchat_turns(reader):
        lines = [f"{'AB'[number % 2]}: {turn}" for number, turn in enumerate(turns)]
        yield Document("\n".join(lines) + "\n", f"chitchat:{name}", "chitchat")


def english_questions(reader: WheelReader) -> Iterator[Document]:
    """Yield short English questions with an answer, a topic at a time; the family is the topic in every language."""
    for member in reader.members("chatterbot_corpus/data/english/", ".yml"):
        content = yaml.load(reader.read_text(member), load_yaml)
        talks = ["\n".join(str(turn).strip() for turn in talk) for talk in content["conversations"]]
        topic = member.removesuffix(".yml").split("/")[-1]
        yield Document("\n\n".join(talks) + "\n", f"chatterbot:{topic}", "chatterbot-english")


def _call(call: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Return the first accepted form of a gold call; arguments that may be left out are."""
    (name, arguments), *_ = call.items()
    return {"name": name, "arguments": {key: values[0] for key, values in arguments.items() if "" not in values}}


def tool_calls(reader: WheelReader) -> Iterator[Document]:
    """Yield requests with the available functions and the right calls (the non-live part); the family is the tool."""
    for category in _BFCL:
        questions = reader.read_text(f"bfcl_eval/data/BFCL_v4_{category}.json").splitlines()
        answers = reader.read_text(f"bfcl_eval/data/possible_answer/BFCL_v4_{category}.json").splitlines()
        gold = {row["id"]: row["ground_truth"] for row in map(json.loads, answers)}
        for row in map(json.loads, questions):
            tools = json.dumps(row["function"], ensure_ascii=False)
            calls = json.dumps([_call(call) for call in gold[row["id"]]], ensure_ascii=False)
            request = row["question"][0][-1]["content"].strip()
            text = f"Tools: {tools}\nRequest: {request}\nCalls: {calls}\n"
            yield Document(text, f"bfcl:{next(iter(gold[row['id']][0]))}", "bfcl")


def reasoned_exam_questions(reader: WheelReader) -> Iterator[Document]:
    """Yield English MMLU example questions with a written argument; the family is the question."""
    prompts = json.loads(reader.read_text("lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"))
    for subject, text in sorted(prompts.items()):
        for number, (question, argument) in enumerate(_COT_ITEM.findall(text)):
            body = f"Question: {question.strip()}\nReasoning: {argument.strip()}\n"
            yield Document(body, f"mmlu:{subject}:{number}", "mmlu-cot")
