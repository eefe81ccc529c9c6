import json

import pytest

from nanotrain.config.errors import UserError
from nanotrain.data.chat_rows import count_tasks, load_rows, rows_as_documents, save_rows


@pytest.fixture
def rows():
    """Two verifiable rows and one of plain chat."""
    made = []
    for number, trace in enumerate(("1 + 1 = 2\n", "2 + 1 = 3\n", None)):
        reply = {"role": "assistant", "content": f"The answer is {number + 2}."}
        reply |= {"reasoning_content": trace} if trace else {}
        messages = [{"role": "user", "content": f"What is {number} + 1? ä"}, reply]
        task = "addition" if trace else "chat"
        made.append({"messages": messages, "task": task, "answer": "", "metadata": {"family": f"f{number}"}})
    return made


def test_running_text_is_prompt_trace_and_answer(rows):
    documents = rows_as_documents(rows, 50)
    assert [d.family for d in documents] == ["f0", "f1", "f2"]
    assert documents[0].text == (
        "User: What is 0 + 1? ä\nAssistant: <think>\n1 + 1 = 2\n</think>\n\nThe answer is 2.\n"
    )
    assert documents[2].text == "User: What is 2 + 1? ä\nAssistant: The answer is 4.\n"
    assert len(rows_as_documents(rows, 1)) == 1


def test_tasks_are_counted(rows):
    assert count_tasks(rows) == {"addition": 2, "chat": 1}


def test_files_round_trip_and_damage_is_named(rows, tmp_path):
    file = tmp_path / "chat/train.jsonl"
    save_rows(rows, file)
    assert load_rows(file) == rows
    good = json.dumps(rows[0])
    for line, message in (
        ("{", "line 2 is not a chat row"),
        ('{"messages": []}', "line 2 is not a chat row"),
        ('"text"', "line 2 is not a chat row"),
        ('{"messages": [{"role": "user", "content": "x"}], "task": "t"}', "line 2 must end with an assistant"),
    ):
        file.write_text(f"{good}\n{line}\n")
        with pytest.raises(UserError, match=message):
            load_rows(file)
    file.write_bytes(good.encode() + b"\n\xff\xfe\n")
    with pytest.raises(UserError, match=rf"train\.jsonl` is not UTF-8: byte 0xff at offset {len(good) + 1}"):
        load_rows(file)
