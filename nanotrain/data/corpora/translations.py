"""Multilingual text: Django's interface messages, chat in other languages, exam questions in seven.

Whatever exists in several languages is one family, so that no translation of a held-out text is trained on.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

import yaml

from nanotrain.data.documents import Document, unit_hash
from nanotrain.data.wheels import WheelReader

_NUM_BUCKETS = 96
"""Messages are gathered into so many groups by a hash of the English message; a group is a family."""
_LANGUAGES = frozenset(
    [
        "ar",
        "cs",
        "de",
        "el",
        "es",
        "fa",
        "fi",
        "fr",
        "he",
        "hi",
        "hu",
        "id",
        "it",
        "ja",
        "ko",
        "nl",
        "pl",
        "pt",
        "ru",
        "sv",
        "tr",
        "uk",
        "vi",
        "zh_Hans",
    ]  # 24 with many speakers
)
_ENTRY = re.compile(
    r'^msgid ((?:"(?:[^"\\]|\\.)*"\s*)+)(?:msgid_plural (?:"(?:[^"\\]|\\.)*"\s*)+)?'
    r'msgstr(?:\[0\])? ((?:"(?:[^"\\]|\\.)*"\s*)+)',
    re.M,
)
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPES = {"\\n": "\n", '\\"': '"', "\\\\": "\\", "\\t": "\t", "\\r": "\r"}
_ESCAPE = re.compile(r"\\.")
_MMLU = re.compile(r"lm_eval/tasks/llama3/instruct/mmlu_(\w\w)/mmlu_\1_(\w+)\.yaml")
_LETTERS = ("A", "B", "C", "D")


class _TaskLoader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):
    """YAML with lm-eval's `!function` tags read as plain strings."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix}")
load_yaml = _TaskLoader


def _unquote(block: str) -> str:
    joined = "".join(_QUOTED.findall(block))
    return _ESCAPE.sub(lambda match: _ESCAPES[match.group()] if match.group() in _ESCAPES else match.group(), joined)


def read_messages(po_text: str) -> list[tuple[str, str]]:
    """Return (English, translation) of a gettext file's translated messages; of plurals, the first form."""
    pairs = [(_unquote(english), _unquote(other)) for english, other in _ENTRY.findall(po_text)]
    return [(english, other) for english, other in pairs if english and other and english != other]


def django_messages(reader: WheelReader) -> Iterator[Document]:
    """Yield, for each language and group of messages, the translations beside the English."""
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for member in reader.members("django/", ".po"):
        language = member.split("/locale/")[1].split("/")[0]
        if language not in _LANGUAGES:
            continue
        for english, other in read_messages(reader.read_text(member)):
            bucket = int(unit_hash(english, "messages") * _NUM_BUCKETS)
            groups[language, bucket].append(f"{other.strip()}\n  ({english.strip()})")
    for (language, bucket), lines in sorted(groups.items()):
        yield Document(f"[{language}]\n" + "\n".join(lines) + "\n", f"django-messages:{bucket}", "django-messages")


def chat_in_languages(reader: WheelReader) -> Iterator[Document]:
    """Yield one document per topic and language other than English; the family is the topic, in every language."""
    for member in reader.members("chatterbot_corpus/data/", ".yml"):
        language, topic = member.removesuffix(".yml").split("/")[-2:]
        if language == "english":
            continue
        content = yaml.load(reader.read_text(member), _TaskLoader)
        turns = ["\n".join(str(turn).strip() for turn in talk) for talk in content["conversations"] or [] if talk]
        if turns:
            yield Document("\n\n".join(turns) + "\n", f"chatterbot:{topic}", "chatterbot")


def exam_questions(reader: WheelReader) -> Iterator[Document]:
    """Yield MMLU's example questions in seven languages; the family is the question, in every language."""
    for member in reader.members("lm_eval/tasks/llama3/instruct/mmlu_", ".yaml"):
        match = _MMLU.fullmatch(member)
        if match is None:
            continue
        content = yaml.load(reader.read_text(member), _TaskLoader)
        if "fewshot_config" not in content:
            continue
        for number, sample in enumerate(content["fewshot_config"]["samples"]):
            choices = [f"{letter}. {sample['input_choice_list'][letter]}" for letter in _LETTERS]
            lines = [str(sample["input_question"]).strip(), *choices, f"= {sample['input_correct_responses'][0]}"]
            yield Document("\n".join(lines) + "\n", f"mmlu:{match.group(2)}:{number}", "mmlu")
