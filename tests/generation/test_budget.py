"""The thinking budget against a brute-force reading of the published rule on character tokens."""

import random

import pytest

from nanotrain.generation.budget import THINK_CLOSE, ThinkingRow

STOP = 1


class Characters:
    """One token a character; the tag is eight tokens, as in a vocabulary that does not hold it."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]


def published_rule(trace: str, budget: int, grace: int) -> int | None:
    """Return after how many characters `</think>` is put in; None when the model closes by itself before that."""
    for count in range(1, len(trace) + 1):
        if trace[:count].endswith(THINK_CLOSE):
            return None
        if count >= budget and trace[count - 1] == "\n":
            return count
        if count >= budget + grace:
            return count
    return None


@pytest.mark.parametrize("seed", range(60))
def test_the_cut_falls_where_the_published_rule_says(seed: int) -> None:
    draw = random.Random(seed)
    body = "".join(draw.choice("ab \n") for _ in range(draw.randrange(1, 80)))
    script = f"{body}{THINK_CLOSE}\n\nanswer"
    budget, grace = draw.randrange(1, 60), draw.randrange(0, 20)
    row = ThinkingRow(Characters(), budget=budget, grace=grace, max_new_tokens=1000, stop_ids={STOP})
    row.begin()
    for character in script:
        if row.forced:
            break
        row.accept(ord(character))
    expected = published_rule(body + THINK_CLOSE, budget, grace)
    assert row.forced == (expected is not None)
    assert row.thinking_tokens == (len(body) if expected is None else expected)


def feed(row: ThinkingRow, script: str) -> None:
    """Propose the script token by token; tokens that are put in do not consume it."""
    wanted = [*map(ord, script), STOP]
    while not row.done:
        pending = bool(row._pending)
        token = row.choose(wanted[0])
        if not pending:
            wanted.pop(0)
        row.accept(token)


def new_row(budget: int | None, grace: int = 5, limit: int = 1000) -> ThinkingRow:
    row = ThinkingRow(Characters(), budget=budget, grace=grace, max_new_tokens=limit, stop_ids={STOP})
    row.begin()
    return row


def test_unlimited_budget_leaves_the_response_alone() -> None:
    row = new_row(None)
    feed(row, "one\ntwo\n</think>\n\nfine")
    result = row.result()
    assert result.text == "one\ntwo\n</think>\n\nfine"
    assert (result.thinking_tokens, result.answer_tokens) == (8, 6)
    assert result.well_formed and result.finished and not result.forced


def test_budget_cuts_at_the_next_newline_and_the_model_goes_on() -> None:
    row = new_row(2)
    feed(row, "one\n\n\nfine")
    result = row.result()
    assert result.text == "one\n</think>\n\nfine"
    assert result.forced and result.well_formed and result.finished
    assert (result.thinking_tokens, result.answer_tokens) == (4, 6)


def test_budget_without_newline_cuts_after_the_grace() -> None:
    row = new_row(2, grace=3)
    feed(row, "abcdefgh")
    assert row.result().text == "abcde</think>fgh"


def test_budget_zero_without_grace_cuts_at_once() -> None:
    row = new_row(0, grace=0)
    feed(row, "\n\nfine")
    result = row.result()
    assert result.text == "</think>\n\nfine" and result.thinking_tokens == 0


def test_a_second_tag_is_not_well_formed() -> None:
    row = new_row(2)
    feed(row, "one\n\nmore</think>fine")
    assert row.result().text.count(THINK_CLOSE) == 2
    assert not row.result().well_formed


def test_a_response_that_never_closes_is_not_well_formed() -> None:
    row = new_row(None, limit=10)
    feed(row, "thinking on and on and on")
    result = row.result()
    assert not result.well_formed and not result.finished and result.thinking_tokens == 10


def test_stop_while_thinking_ends_the_response() -> None:
    row = new_row(50)
    feed(row, "short")
    result = row.result()
    assert result.finished and not result.well_formed and result.text == "short"
