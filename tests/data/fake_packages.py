"""Wheels with a little made-up content in the layout of the pinned packages; loaded by path from the tests that need them."""

import base64
import bz2
import gzip
import json
import random
import zipfile
from pathlib import Path

WORDS = [
    "river",
    "stone",
    "light",
    "mountain",
    "paper",
    "window",
    "garden",
    "letter",
    "number",
    "evening",
    "market",
    "bridge",
    "winter",
    "silver",
    "valley",
]
LANGUAGES = ("de", "fr", "ja")


def sentence(draw: random.Random, length: int = 12) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(length)).capitalize() + "."


def paragraph(draw: random.Random, sentences: int = 12) -> str:
    return " ".join(sentence(draw) for _ in range(sentences))


def _wikipedia(draw: random.Random) -> bytes:
    pages = []
    for number in range(30):
        body = f"'''Page {number}''' is a [[thing|article]].&lt;ref&gt;gone&lt;/ref&gt; {{{{box}}}} {paragraph(draw)}"
        pages.append(
            f"<page><title>Page {number}</title><ns>0</ns><id>1</id><revision>"
            f'<text xml:space="preserve">{body}\n== References ==\nlost</text></revision></page>'
        )
    pages.append('<page><title>R</title><ns>0</ns><redirect title="x" /><text>#REDIRECT</text></page>')
    return bz2.compress("\n".join(pages).encode())


def _po(draw: random.Random, language: str) -> str:
    draw.seed(3)  # the same English in every language
    header = 'msgid ""\nmsgstr ""\n"Language: x\\n"\n'
    entries = [f'msgid "{(text := sentence(draw))}"\nmsgstr "{language} {text}"\n' for _ in range(200)]
    return "\n".join([header, *entries])


def _chitchat(draw: random.Random) -> str:
    talks = {}
    for number in range(60):
        turns = [[{"text": sentence(draw)}, {"text": "And then?"}] for _ in range(6)]
        talks[f"talk{number}"] = {"messages": turns}
    return json.dumps(talks)


def _bfcl(draw: random.Random) -> tuple[str, str]:
    questions, answers = [], []
    for number in range(20):
        name = f"tool_{number}"
        question = [[{"role": "user", "content": sentence(draw)}]]
        questions.append({"id": f"q{number}", "question": question, "function": [{"name": name, "parameters": {}}]})
        answers.append({"id": f"q{number}", "ground_truth": [{name: {"a": [number, 0], "unit": ["m", ""]}}]})
    return tuple("\n".join(map(json.dumps, rows)) for rows in (questions, answers))


def _mmlu(draw: random.Random) -> str:
    items = []
    for _ in range(5):
        choices = "".join(f"      {letter}: {draw.choice(WORDS)}\n" for letter in "ABCD")
        items.append(
            f"  - input_choice_list:\n{choices}    input_correct_responses:\n    - B\n    input_question: {sentence(draw)}\n"
        )
    return (
        "fewshot_config:\n  sampler: first_n\n  samples:\n" + "".join(items) + "process_docs: !function utils.process\n"
    )


def _champ(draw: random.Random) -> str:
    steps = [{"_text": "First."}, {"_text": "Then."}]
    problem = {"_text": "", "_answer": "7", "solution": {"steps": steps}}
    problems = {f"P_{n}": problem | {"_text": sentence(draw)} for n in range(25)}
    return json.dumps({"problems": problems})


def _codeio(draw: random.Random) -> bytes:
    rows = [
        {
            "task_description": sentence(draw),
            "input_output_spec": "Input: n",
            "code_sample": f"def f(n):\n    return n + {n}",
        }
        for n in range(30)
    ]
    return gzip.compress("\n".join(map(json.dumps, rows)).encode(), mtime=0)


def members(tekken: bytes) -> dict[str, dict[str, bytes | str]]:
    """Return package -> member -> content."""
    draw = random.Random(1)
    questions, answers = _bfcl(draw)
    bfcl = {f"bfcl_eval/data/BFCL_v4_{c}.json": questions for c in ("simple_python", "multiple", "parallel")}
    bfcl |= {name.replace("data/", "data/possible_answer/"): answers for name in bfcl}
    django = {
        f"django/part{n}/module.py": f"import os\n\n\n# {paragraph(draw, 5)}\ndef f{n}():\n    return {n}\n"
        for n in range(30)
    }
    django |= {f"django/conf/locale/{lang}/LC_MESSAGES/django.po": _po(draw, lang) for lang in LANGUAGES}
    talk = "conversations:\n" + "".join(f"- - {sentence(draw)}\n  - {sentence(draw)}\n" for _ in range(5))
    chatterbot = {f"chatterbot_corpus/data/{lang}/topic{n}.yml": talk.replace("river", lang) + f"- - hi\n  - {n}\n"
                  for lang in ("english", "german") for n in range(12)}  # fmt: skip
    mmlu = {f"lm_eval/tasks/llama3/instruct/mmlu_{lang}/mmlu_{lang}_law.yaml": _mmlu(draw) for lang in ("de", "th")}
    mmlu["lm_eval/tasks/llama3/instruct/mmlu_de/_mmlu_de_group.yaml"] = "group: x\n"
    cot = "\n\n".join(
        f"Q: {sentence(draw)}\n(A) x (B) y\nA: Let's think step by step. {sentence(draw)} The answer is (B)."
        for _ in range(5)
    )
    mmlu["lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"] = json.dumps({"law": f"About law.\n\n{cot}"})
    docstring = '"""Doc.\n\n    ' + "{}\n    >>> 1 + 1\n    2\n" + '    """'
    sympy = {
        f"sympy/m{n}.py": f"def f():\n    {docstring.format(paragraph(draw, 4))}\n    return {n}\n" for n in range(30)
    }
    return {
        "gensim": {"gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2": _wikipedia(draw)},
        "sympy": sympy | {"sympy/tests/test_x.py": docstring.format(paragraph(draw, 4))},
        "champ-dataset": {"champ_dataset/dataset_files/v0.json": _champ(draw)},
        "django": django,
        "reasoning-gym": {"reasoning_gym/data/codeio.jsonl.gz": _codeio(draw)},
        "chatterbot-corpus": chatterbot,
        "lm-eval": mmlu,
        "chitchat-dataset": {"chitchat_dataset/dataset.json": _chitchat(draw)},
        "bfcl-eval": bfcl,
        "mistral-common": {"mistral_common/data/tekken_240911.json": tekken},
    }  # fmt: skip


def byte_tekken(num_merges: int = 60) -> bytes:
    """A tekken file of the 256 bytes and a few merges along frequent words."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in (b" the", b" answer", b" river", b" stone", b" light", b" paper", b"think", b" winter", b" garden"):
        for length in range(2, len(word) + 1):
            if word[:length] not in tokens and len(tokens) < 256 + num_merges:
                tokens.append(word[:length])
    vocabulary = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(tokens)]
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return json.dumps({"config": {"pattern": pattern}, "vocab": vocabulary}).encode()


def make_wheels(folder: Path, tekken: bytes) -> dict[str, Path]:
    """Write one wheel a package and return package -> wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    wheels = {}
    for package, content in members(tekken).items():
        wheels[package] = folder / f"{package.replace('-', '_')}-1-py3-none-any.whl"
        with zipfile.ZipFile(wheels[package], "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(zipfile.ZipInfo(name), data)
    return wheels
