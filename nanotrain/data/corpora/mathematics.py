"""Mathematical text: sympy's documentation strings, CHAMP's competition problems with solutions, word problems."""

import json
import re
import textwrap
from collections.abc import Iterator

from nanotrain.data.corpora.word_problems import word_problems
from nanotrain.data.documents import Document
from nanotrain.data.wheels import WheelReader

_DOCSTRING = re.compile(r'^([ \t]*)[ru]?"""(.*?)"""', re.S | re.M)
_SHORTEST_DOCSTRING = 160


def sympy_documentation(reader: WheelReader) -> Iterator[Document]:
    """Yield the documentation strings of one sympy module as one document; the family is the module."""
    for member in reader.members("sympy/", ".py"):
        if "/tests/" in member or "/benchmarks/" in member:
            continue
        parts = []
        for indent, body in _DOCSTRING.findall(reader.read_text(member)):
            if len(body) >= _SHORTEST_DOCSTRING:
                parts.append(textwrap.dedent(indent + body.lstrip("\n") if body.startswith("\n") else body).strip())
        if parts:
            yield Document("\n\n".join(parts) + "\n", f"sympy:{member}", "sympy")


def champ_problems(reader: WheelReader) -> Iterator[Document]:
    """Yield CHAMP's problems, each with its solution in steps and its answer; the family is the problem."""
    content = json.loads(reader.read_text("champ_dataset/dataset_files/v0.json"))
    for name, problem in sorted(content["problems"].items()):
        steps = [step["_text"] for step in problem["solution"]["steps"]]
        lines = [f"Problem. {problem['_text']}", "Solution.", *steps, f"Answer: {problem['_answer']}"]
        yield Document("\n".join(lines) + "\n", f"champ:{name}", "champ")


def word_problem_texts(first: int, count: int) -> Iterator[Document]:
    """Yield generated word problems with worked solutions as running text; the family is the template."""
    for problem in word_problems(first, count):
        text = f"{problem.question}\n{problem.steps}Answer: {problem.answer}\n"
        yield Document(text, problem.family, "gsm_symbolic")
