"""Verifiable reasoning tasks: a question, a trace that solves it in short lines, and an answer that a rule can check.

Small enough that a model of a few million parameters learns some of them in minutes, and written by our own step
printers, so that the trace is right by construction. A problem depends on (task, number) only.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanotrain.data.permutation import derive_key

ANSWER_FORM = "The answer is {}."
THINK_CLOSE = "</think>"
_ANSWER = re.compile(r"The answer is ([^\n]*)")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_LEGS = {"cat": 4, "dog": 4, "cow": 4, "hen": 2, "duck": 2, "ant": 6, "bee": 6, "spider": 8, "crab": 10, "snail": 0}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Problem:
    """One question.

    Attributes:
        prompt: what the user asks.
        trace: lines of reasoning, each ended by a newline.
        answer: what `ANSWER_FORM` is filled with.
    """

    prompt: str
    trace: str
    answer: str


def _problem(prompt: str, lines: list[str], answer: object) -> Problem:
    return Problem(prompt, "\n".join(lines) + "\n", str(answer))


def _addition(draw: random.Random) -> Problem:
    digits = draw.choice((1, 2, 2, 3, 3))
    a, b = (draw.randrange(10**digits) for _ in range(2))
    lines, carry, shown = [f"{a} + {b}"], 0, ""
    for place in range(digits):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        carried = f" + {carry}" if carry else ""
        carry, shown = total // 10, f"{total % 10}{shown}"
        lines.append(f"{x} + {y}{carried} = {total}" + (f", carry {carry}" if carry else ""))
    lines.append(f"digits {f'{carry}' if carry else ''}{shown}")
    prompt = draw.choice(("What is {} + {}?", "Add {} and {}.", "Compute {} + {}.")).format(a, b)
    return _problem(prompt, lines, a + b)


def _subtraction(draw: random.Random) -> Problem:
    digits = draw.choice((1, 2, 2, 3))
    b, a = sorted(draw.randrange(10**digits) for _ in range(2))
    lines, borrow, shown = [f"{a} - {b}"], 0, ""
    for place in range(digits):
        x, y = a // 10**place % 10, b // 10**place % 10
        borrowed = f" - {borrow}" if borrow else ""
        left = x - y - borrow
        borrow = int(left < 0)
        shown = f"{left + 10 * borrow}{shown}"
        lines.append(f"{x + 10 * borrow} - {y}{borrowed} = {left + 10 * borrow}" + (", borrow 1" if borrow else ""))
    lines.append(f"digits {shown}")
    prompt = draw.choice(("What is {0} - {1}?", "Take {1} from {0}.", "Compute {0} - {1}."))
    return _problem(prompt.format(a, b), lines, a - b)


def _chain(draw: random.Random) -> Problem:
    terms = [draw.randrange(1, 10) for _ in range(draw.randrange(3, 8))]
    total, text, lines = terms[0], str(terms[0]), [f"start with {terms[0]}"]
    for term in terms[1:]:
        sign = draw.choice("+-") if total >= term else "+"
        after = total + term if sign == "+" else total - term
        lines.append(f"{total} {sign} {term} = {after}")
        total, text = after, f"{text} {sign} {term}"
    return _problem(draw.choice(("Compute {}.", "What is {}?", "Work out {}.")).format(text), lines, total)


def _product(draw: random.Random) -> Problem:
    a, b = draw.randrange(2, 100), draw.randrange(2, 10)
    tens, ones = a // 10 * 10, a % 10
    lines = [f"{a} = {tens} + {ones}", f"{tens} x {b} = {tens * b}", f"{ones} x {b} = {ones * b}"]
    lines.append(f"{tens * b} + {ones * b} = {a * b}")
    return _problem(draw.choice(("What is {} x {}?", "Multiply {} by {}.")).format(a, b), lines, a * b)


def _extreme(draw: random.Random) -> Problem:
    numbers = draw.sample(range(100), draw.randrange(3, 9))
    word, choose = draw.choice((("largest", max), ("smallest", min)))
    best, lines = numbers[0], [f"start with {numbers[0]}"]
    for number in numbers[1:]:
        kept = choose(best, number)
        lines.append(f"{number}: " + ("new " if kept == number else "keep ") + str(kept))
        best = kept
    listed = ", ".join(map(str, numbers))
    return _problem(draw.choice(("Which is the {}: {}?", "Find the {} of {}.")).format(word, listed), lines, best)


def _sorting(draw: random.Random) -> Problem:
    numbers = draw.sample(range(100), draw.randrange(3, 7))
    left, lines = list(numbers), []
    while left:
        least = min(left)
        left.remove(least)
        lines.append(f"least {least}" + (f", left {' '.join(map(str, left))}" if left else ", done"))
    prompt = draw.choice(("Sort these numbers: {}", "Put in rising order: {}"))
    return _problem(prompt.format(" ".join(map(str, numbers))), lines, " ".join(map(str, sorted(numbers))))


def _counting(draw: random.Random) -> Problem:
    letters = draw.sample(_LETTERS, draw.randrange(2, 5))
    word = [draw.choice(letters) for _ in range(draw.randrange(4, 13))]
    wanted, count, lines = draw.choice(letters), 0, []
    for letter in word:
        count += letter == wanted
        lines.append(f"{letter} {count}")
    prompt = draw.choice(("How many times does {} occur in: {}", "Count the letter {} in: {}"))
    return _problem(prompt.format(wanted, " ".join(word)), lines, count)


def _reversal(draw: random.Random) -> Problem:
    word = [draw.choice(_LETTERS) for _ in range(draw.randrange(3, 9))]
    lines, done = [], []
    for letter in reversed(word):
        done.append(letter)
        lines.append(f"take {letter}: {' '.join(done)}")
    prompt = draw.choice(("Reverse: {}", "Write backwards: {}"))
    return _problem(prompt.format(" ".join(word)), lines, " ".join(done))


def _gcd(draw: random.Random) -> Problem:
    factor = draw.randrange(1, 13)
    a, b = (factor * draw.randrange(1, 13) for _ in range(2))
    x, y, lines = max(a, b), min(a, b), []
    while y:
        lines.append(f"{x} = {x // y} x {y} + {x % y}")
        x, y = y, x % y
    lines.append(f"rest 0, so {x}")
    prompt = draw.choice(("What is the greatest common divisor of {} and {}?", "Find gcd({}, {})."))
    return _problem(prompt.format(a, b), lines, x)


def _legs(draw: random.Random) -> Problem:
    animals = draw.sample(sorted(_LEGS), draw.randrange(1, 5))
    counts = [draw.randrange(1, 10) for _ in animals]
    lines, total = [], 0
    for animal, count in zip(animals, counts, strict=True):
        legs = count * _LEGS[animal]
        lines.append(f"{animal}: {count} x {_LEGS[animal]} = {legs}")
        lines.append(f"{total} + {legs} = {total + legs}")
        total += legs
    names = [f"{count} {animal}{'s' if count > 1 else ''}" for animal, count in zip(animals, counts, strict=True)]
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return _problem(draw.choice(("How many legs do {} have?", "Count the legs of {}.")).format(listed), lines, total)


def _weekday(draw: random.Random) -> Problem:
    start, days = draw.randrange(7), draw.randrange(1, 61)
    step, word = draw.choice(((1, "after"), (-1, "before")))
    rest = days % 7
    lines = [f"{days} = {days // 7} x 7 + {rest}", _WEEKDAYS[start]]
    lines += [f"{number} {_WEEKDAYS[(start + step * number) % 7]}" for number in range(1, rest + 1)]
    end = _WEEKDAYS[(start + step * days) % 7]
    prompt = draw.choice(("Which day is {} days {} {}?", "Name the day {} days {} {}."))
    return _problem(prompt.format(days, word, _WEEKDAYS[start]), lines, end)


def _comparison(draw: random.Random) -> Problem:
    digits = draw.randrange(2, 6)
    a = draw.randrange(10 ** (digits - 1), 10**digits)
    place = draw.randrange(digits)
    high = a // 10**place // 10 * 10 ** (place + 1)
    b = max(high + draw.randrange(10 ** (place + 1)), 10 ** (digits - 1))
    b = b if b != a else (a + 1 if a + 1 < 10**digits else a - 1)
    lines = []
    for x, y in zip(str(a), str(b), strict=True):
        lines.append(f"{x} and {y}: " + ("same" if x == y else f"{max(x, y)} is larger"))
        if x != y:
            break
    prompt = draw.choice(("Which is larger, {} or {}?", "Compare {} and {}: which one is larger?"))
    return _problem(prompt.format(a, b), lines, max(a, b))


TASKS: dict[str, Callable[[random.Random], Problem]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "chain_sum": _chain,
    "product": _product,
    "extreme": _extreme,
    "sorting": _sorting,
    "counting": _counting,
    "reversal": _reversal,
    "gcd": _gcd,
    "leg_counting": _legs,
    "weekday": _weekday,
    "comparison": _comparison,
}
WORD_PROBLEM = "word_problem"
VERIFIABLE = (*TASKS, WORD_PROBLEM)
"""Tasks whose rows `score` can judge."""


def make_problem(task: str, number: int) -> Problem:
    """Return problem `number` of a task; the same one in every process."""
    return TASKS[task](random.Random(derive_key("task", task, number)))


def extract_answer(response_text: str) -> str | None:
    """Return what stands in the last `The answer is ...` after the trace, without the full stop; None without one.

    Args:
        response_text: with or without its trace; what precedes the last `</think>` does not count.
    """
    found = _ANSWER.findall(response_text.rsplit(THINK_CLOSE, 1)[-1])
    return " ".join(found[-1].strip().removesuffix(".").split()) if found else None


def score(row: dict[str, Any], response_text: str) -> float:
    """Return 1.0 when the response's final answer is the row's, else 0.0.

    Numbers are compared by value, everything else by its words. A row whose task is not verifiable scores 0.0.
    """
    given = extract_answer(response_text)
    if given is None or row["task"] not in VERIFIABLE:
        return 0.0
    expected = " ".join(str(row["answer"]).split())
    if _NUMBER.fullmatch(given) and _NUMBER.fullmatch(expected):
        return float(float(given) == float(expected))
    return float(given == expected)
