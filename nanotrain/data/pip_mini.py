"""The quickstart's corpus: five categories of real text from ten pinned packages; 83 MB to download, 11 MB of text.

Licences are those of the files that are read. Text under a share-alike licence is fetched when the data is prepared
and is never part of this repository.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nanotrain.data.corpora import conversations, mathematics, source_code, translations, wikipedia
from nanotrain.data.documents import Document
from nanotrain.data.wheels import Package, WheelReader

TEKKEN_MEMBER = "mistral_common/data/tekken_240911.json"
TEKKEN_PACKAGE = "mistral-common"
CHITCHAT_PACKAGE = "chitchat-dataset"
NUM_ROW_DOCUMENTS = 3600
"""Training chat rows that also serve as running text of the sft category."""

PACKAGES = (
    Package(
        "gensim",
        "4.4.0",
        "CC-BY-SA-3.0 (the Wikipedia slice)",
        27.9,
        members=((wikipedia.MEMBER, "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"),),
    ),
    Package("sympy", "1.14.0", "BSD-3-Clause", 6.3, "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"),
    Package("champ-dataset", "1.0.0", "MIT", 7.6, "aa59df5ae28e2ec76a401a46faf3d6395920be8009a01ce451f7d5c131d82201"),
    Package(
        "django", "5.2.19", "BSD-3-Clause", 8.3, "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00"
    ),
    Package(
        "reasoning-gym", "0.1.25", "Apache-2.0", 7.0, "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435"
    ),
    Package(
        "chatterbot-corpus",
        "1.3.3",
        "BSD-3-Clause",
        0.3,
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    ),
    Package("lm-eval", "0.4.13", "MIT", 9.1, "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a"),
    Package(CHITCHAT_PACKAGE, "0.9.0", "MIT", 8.1, "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"),
    Package(
        "bfcl-eval", "2026.3.23", "Apache-2.0", 1.9, "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
    ),
    Package(
        TEKKEN_PACKAGE, "1.13.1", "Apache-2.0", 6.6, "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"
    ),
)


@dataclass(frozen=True)
class Source:
    """Where some of a category's text comes from.

    Attributes:
        name: as in the manifest.
        category: one of config.data.CATEGORIES.
        package: whose wheel is read.
        member: what is read in it, for the manifest.
        extract: wheel -> documents.
        max_bytes: of text kept, whole families by a hash of their names; 0 = all.
    """

    name: str
    category: str
    package: str
    member: str
    extract: Callable[[WheelReader], Iterator[Document]]
    max_bytes: int = 0


def _word_problem_texts(reader: WheelReader) -> Iterator[Document]:
    """The generator runs from the installed reasoning-gym of the same version, not from the wheel."""
    return mathematics.word_problem_texts(0, 1000)


_PO, _MMLU = "django/**/*.po", "lm_eval/tasks/llama3/instruct/mmlu_*/*.yaml"
_COT = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
_BFCL = "bfcl_eval/data/BFCL_v4_{simple_python,multiple,parallel}.json"
SOURCES = (
    Source("enwiki", "web", "gensim", wikipedia.MEMBER, wikipedia.articles),
    Source("sympy", "math", "sympy", "sympy/**/*.py", mathematics.sympy_documentation, 1_300_000),
    Source("champ", "math", "champ-dataset", "champ_dataset/dataset_files/v0.json", mathematics.champ_problems),
    Source("gsm_symbolic", "math", "reasoning-gym", "generated", _word_problem_texts),
    Source("django", "code", "django", "django/**/*.py", source_code.django_files, 1_100_000),
    Source("codeio", "code", "reasoning-gym", source_code.CODEIO_MEMBER, source_code.codeio_programs, 900_000),
    Source("django-messages", "multilingual", "django", _PO, translations.django_messages, 1_200_000),
    Source("chatterbot", "multilingual", "chatterbot-corpus", "chatterbot_corpus/data", translations.chat_in_languages),
    Source("mmlu", "multilingual", "lm-eval", _MMLU, translations.exam_questions, 500_000),
    Source("chitchat", "sft", CHITCHAT_PACKAGE, "chitchat_dataset/dataset.json", conversations.chitchat, 600_000),
    Source(
        "chatterbot-english",
        "sft",
        "chatterbot-corpus",
        "chatterbot_corpus/data/english",
        conversations.english_questions,
    ),
    Source("bfcl", "sft", "bfcl-eval", _BFCL, conversations.tool_calls, 400_000),
    Source("mmlu-cot", "sft", "lm-eval", _COT, conversations.reasoned_exam_questions),
)
