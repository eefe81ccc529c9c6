import math
import re

import pytest

from nanotrain.data.tasks import (
    _LEGS,
    _WEEKDAYS,
    ANSWER_FORM,
    TASKS,
    VERIFIABLE,
    extract_answer,
    make_problem,
    score,
)


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def solve(task: str, prompt: str) -> str:  # noqa: PLR0911
    """Answer a prompt from its words alone, without the code that made it."""
    values = numbers(prompt)
    if task == "addition":
        return str(values[0] + values[1])
    if task == "subtraction":
        return str(max(values) - min(values))
    if task == "chain_sum":
        total = 0
        for sign, term in re.findall(r"([+-]?) ?(\d+)", re.search(r"\d.*\d", prompt).group()):
            total += -int(term) if sign == "-" else int(term)
        return str(total)
    if task == "product":
        return str(values[0] * values[1])
    if task == "extreme":
        return str(max(values) if "largest" in prompt else min(values))
    if task == "sorting":
        return " ".join(map(str, sorted(values)))
    if task == "counting":
        asked, letters = prompt.split(": ")
        wanted = re.search(r"does (\w) occur|letter (\w) in", asked)
        return str(letters.split().count(wanted.group(1) or wanted.group(2)))
    if task == "reversal":
        return " ".join(reversed(prompt.split(": ")[1].split()))
    if task == "gcd":
        return str(math.gcd(*values))
    if task == "leg_counting":
        return str(sum(int(n) * _LEGS[animal] for n, animal in re.findall(r"(\d+) (\w+?)s?\b", prompt)))
    if task == "weekday":
        sign = 1 if "after" in prompt else -1
        start = next(i for i, day in enumerate(_WEEKDAYS) if day in prompt)
        return _WEEKDAYS[(start + sign * values[0]) % 7]
    assert task == "comparison"
    return str(max(values))


@pytest.mark.parametrize("task", sorted(TASKS))
def test_answers_are_right_and_traces_are_lines_that_lead_to_them(task):
    for number in range(400):
        problem = make_problem(task, number)
        assert problem.answer == solve(task, problem.prompt), problem
        lines = problem.trace.split("\n")
        assert lines[-1] == "" and all(line.strip() for line in lines[:-1])
        assert "The answer is" not in problem.trace and "</think>" not in problem.trace
        for left, right in re.findall(r"^([\d +x-]*\d) = (\d+)(?:,|$)", problem.trace, re.M):
            assert eval(left.replace("x", "*")) == int(right), problem


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_problem_depends_on_its_number_only(task):
    assert make_problem(task, 17) == make_problem(task, 17)
    assert len({make_problem(task, n).prompt for n in range(300)}) > 100


def row(answer: str, task: str = "addition") -> dict:
    return {"task": task, "answer": answer}


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("The answer is 42.", "42", 1.0),
        ("3 + 4\n= 7\n</think>\n\nThe answer is 7.", "7", 1.0),
        ("The answer is 7.\n</think>\n\nThe answer is 8.", "7", 0.0),
        ("The answer is 7.\n</think>\n\n", "7", 0.0),
        ("The answer is 6. No.\nThe answer is 7.", "7", 1.0),
        ("The answer is 7", "7", 1.0),
        ("The answer is 07.", "7", 1.0),
        ("The answer is 7.0.", "7", 1.0),
        ("The answer is 71.", "7", 0.0),
        ("The answer is 7 apples.", "7", 0.0),
        ("7", "7", 0.0),
        ("", "7", 0.0),
        ("The answer is .", "7", 0.0),
        ("The answer is a  b c.\n", "a b c", 1.0),
        ("The answer is c b a.", "a b c", 0.0),
        ("The answer is Monday.", "Monday", 1.0),
        ("x</think>The answer is 1.</think>The answer is 2.", "2", 1.0),
    ],
)
def test_scores(response, answer, expected):
    assert score(row(answer), response) == expected


def test_only_verifiable_rows_score():
    assert score(row("", "chat"), "The answer is .") == 0.0
    assert all(score(row("5", task), ANSWER_FORM.format(5)) == 1.0 for task in VERIFIABLE)
    assert extract_answer("no form") is None
