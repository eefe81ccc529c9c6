import pytest

from nanotrain.config.errors import UserError
from nanotrain.data.chat_mixture import CHAT_SHARE, WORD_PROBLEM_SHARE, build_rows, conversation_row
from nanotrain.data.chat_rows import count_tasks
from nanotrain.data.documents import unit_hash
from nanotrain.data.tasks import TASKS, VERIFIABLE, score

TALKS = [(f"talk {i}", ["Hello", f"Hi, I am {i}", "How are you?", "Well, thank you", "unanswered"]) for i in range(60)]


@pytest.fixture(scope="module")
def rows():
    return build_rows(600, 120, 0.1, TALKS)


def test_counts_and_shares_are_exact(rows):
    train, validation = rows
    assert (len(train), len(validation)) == (600, 120)
    counts = count_tasks(train)
    assert counts["chat"] == round(CHAT_SHARE * 600)
    assert counts["word_problem"] == round(WORD_PROBLEM_SHARE * (600 - counts["chat"]))
    tasks = [counts[task] for task in TASKS]
    assert max(tasks) - min(tasks) <= 1
    assert set(count_tasks(validation)) == set(VERIFIABLE)


def test_sides_share_no_prompt_and_no_family(rows):
    train, validation = rows
    for key in (lambda r: r["messages"][0]["content"], lambda r: r["metadata"]["family"]):
        assert not {key(row) for row in train if row["task"] != "chat"} & {key(row) for row in validation}
    assert all(unit_hash(row["metadata"]["family"], "split") < 0.1 for row in validation)
    assert all(unit_hash(row["metadata"]["family"], "split") >= 0.1 for row in train)
    prompts = [row["messages"][0]["content"] for row in train if row["task"] != "chat"]
    assert len(prompts) == len(set(prompts))


def test_every_gold_response_scores_one(rows):
    for row in (*rows[0], *rows[1]):
        if row["task"] != "chat":
            reply = row["messages"][-1]
            assert score(row, reply["reasoning_content"] + "</think>\n\n" + reply["content"]) == 1.0
            assert reply["reasoning_content"].endswith("\n")


def test_rows_are_mixed_and_stable(rows):
    assert rows == build_rows(600, 120, 0.1, TALKS)
    assert len({row["task"] for row in rows[0][:40]}) > 8


def test_validation_does_not_depend_on_the_number_of_training_rows(rows):
    assert build_rows(100, 120, 0.1, TALKS)[1] == rows[1]


def test_conversations_end_with_the_assistant():
    row = conversation_row("t", ["a", "b", "c"])
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert conversation_row("t", ["a"]) is None
    assert conversation_row("t", ["a" * 10_000, "b"]) is None


def test_too_many_rows_are_refused(monkeypatch):
    monkeypatch.setattr("nanotrain.data.chat_mixture.TASKS", {"weekday": TASKS["weekday"]})
    monkeypatch.setattr("nanotrain.data.chat_mixture.WORD_PROBLEM_SHARE", 0.0)
    with pytest.raises(UserError, match=r"`stage\.corpus\.num_chat_rows` \(50000\) exceeds the \d+ distinct prompts"):
        build_rows(50_000, 1, 0.1, [])
