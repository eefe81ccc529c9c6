"""The chat rows of fine-tuning and evaluation: verifiable tasks with traces, and a little plain conversation.

A prompt is on one side of the split, by the same hash of its family that splits the text (a word problem's family is
its template). Validation rows are verifiable without exception.
"""

import itertools
import json
from collections.abc import Iterator

from nanotrain.config.errors import UserError
from nanotrain.data.chat_rows import Row
from nanotrain.data.corpora.word_problems import LARGEST, word_problems
from nanotrain.data.documents import unit_hash
from nanotrain.data.tasks import ANSWER_FORM, TASKS, WORD_PROBLEM, make_problem

WORD_PROBLEM_SHARE = 0.06
CHAT_SHARE = 0.04
"""Of the training rows."""
FIRST_WORD_PROBLEM = 100_000
"""Problems before this number belong to the pretraining text (corpora/mathematics)."""
_MAX_CHAT_CHARACTERS = 600
_MAX_WORD_PROBLEM_CHARACTERS = 620
"""Longer ones would not fit the quickstart's sequence length."""
_PATIENCE = 2000
"""Draws without a new prompt after which a task counts as used up."""


def _row(task: str, prompt: str, trace: str, answer: str, family: str) -> Row:
    reply = {"role": "assistant", "reasoning_content": trace, "content": ANSWER_FORM.format(answer)}
    messages = [{"role": "user", "content": prompt}, reply]
    return {"messages": messages, "task": task, "answer": answer, "metadata": {"family": family}}


def _task_rows(task: str) -> Iterator[Row]:
    """Yield rows with ever new prompts until the task has none left."""
    seen: set[str] = set()
    misses = 0
    for number in itertools.count():
        problem = make_problem(task, number)
        if problem.prompt in seen:
            misses += 1
            if misses >= _PATIENCE:
                return
            continue
        misses = 0
        seen.add(problem.prompt)
        yield _row(
            task, problem.prompt, problem.trace, problem.answer, f"task:{task}:{problem.trace}"
        )  # the numbers, however they are asked for


def _word_problem_rows() -> Iterator[Row]:
    step = 4096
    seen: set[str] = set()
    for first in range(FIRST_WORD_PROBLEM, LARGEST - step, step):
        for problem in word_problems(first, step):
            size = len(problem.question) + len(problem.steps)
            if size <= _MAX_WORD_PROBLEM_CHARACTERS and problem.question not in seen:
                seen.add(problem.question)
                yield _row(WORD_PROBLEM, problem.question, problem.steps, problem.answer, problem.family)


def conversation_row(name: str, turns: list[str]) -> Row | None:
    """Return a row of plain chat (no trace): the beginning of a conversation, ended by the assistant; None if short."""
    kept: list[str] = []
    for turn in turns:
        if sum(map(len, kept)) + len(turn) > _MAX_CHAT_CHARACTERS:
            break
        kept.append(turn)
    kept = kept[: len(kept) // 2 * 2]
    if not kept:
        return None
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, kept, strict=False)]
    return {"messages": messages, "task": "chat", "answer": "", "metadata": {"family": f"chitchat:{name}"}}


def build_rows(
    num_train: int, num_validation: int, validation_fraction: float, conversations: list[tuple[str, list[str]]]
) -> tuple[list[Row], list[Row]]:
    """Return (training rows, validation rows), each in a mixed order.

    Args:
        num_train: rows of training.
        num_validation: rows of validation, verifiable ones only.
        validation_fraction: share of families held out.
        conversations: (id, turns) of plain chat, in order of use.

    Raises:
        UserError: the tasks have fewer distinct prompts than asked for.
    """
    chat = [row for name, turns in conversations if (row := conversation_row(name, turns)) is not None]
    plain = [row for row in chat if not _is_held_out(row, validation_fraction)][: round(CHAT_SHARE * num_train)]
    train = plain + _verifiable_rows(num_train - len(plain), False, validation_fraction)
    validation = _verifiable_rows(num_validation, True, validation_fraction)
    for name, wanted, rows in (
        ("num_chat_rows", num_train, train),
        ("num_chat_validation_rows", num_validation, validation),
    ):
        if len(rows) < wanted:
            raise UserError(
                f"`stage.corpus.{name}` ({wanted}) exceeds the {len(rows)} distinct prompts that the tasks have on that"
                " side of the split; lower it or change `validation_fraction`."
            )
    return _mixed(train), _mixed(validation)


def _verifiable_rows(count: int, held_out: bool, validation_fraction: float) -> list[Row]:
    """Return rows of one side of the split: word problems by their share, then the tasks in turn while they last."""
    rows: list[Row] = []
    word_problems_wanted = round(WORD_PROBLEM_SHARE * count)
    for streams, total in (
        ({WORD_PROBLEM: _word_problem_rows()}, word_problems_wanted),
        ({task: _task_rows(task) for task in TASKS}, count),
    ):
        while len(rows) < total and streams:
            for task in list(streams):
                matching = (row for row in streams[task] if _is_held_out(row, validation_fraction) == held_out)
                row = next(matching, None)
                if row is None:
                    del streams[task]
                elif len(rows) < total:
                    rows.append(row)
    return rows


def _is_held_out(row: Row, validation_fraction: float) -> bool:
    return unit_hash(row["metadata"]["family"], "split") < validation_fraction


def _mixed(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: unit_hash(json.dumps(row, sort_keys=True), "order"))
