import json
from pathlib import Path

import pytest

from nanotrain.checkpoint.hf_folder import load_tokenizer
from nanotrain.config.errors import UserError
from nanotrain.data.manifest import write_manifest
from nanotrain.evaluation.prompts import build_prompts, load_validation_rows


def folder_with(tmp_path: Path, lines: list[str]) -> Path:
    (tmp_path / "chat").mkdir(parents=True)
    (tmp_path / "chat" / "validation.jsonl").write_text("".join(line + "\n" for line in lines))
    write_manifest(tmp_path, {"tokenizer_digest": ""}, ["chat/validation.jsonl"])
    return tmp_path


def test_order_in_the_file_does_not_matter_and_sets_are_nested(data_folder: Path, tmp_path: Path) -> None:
    lines = (data_folder / "chat" / "validation.jsonl").read_text().splitlines()
    turned = folder_with(tmp_path, lines[::-1])
    assert load_validation_rows(turned, 7) == load_validation_rows(data_folder, 7)
    assert load_validation_rows(data_folder, 16)[:7] == load_validation_rows(data_folder, 7)
    assert len({row["task"] for row in load_validation_rows(data_folder, 8)}) == 2  # mixed


def test_too_few_rows_are_refused(data_folder: Path) -> None:
    with pytest.raises(UserError, match=r"`stage.num_prompts` \(17\) exceeds the 16 rows"):
        load_validation_rows(data_folder, 17)


def test_a_changed_file_is_refused(data_folder: Path, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, (data_folder / "chat" / "validation.jsonl").read_text().splitlines())
    with open(folder / "chat" / "validation.jsonl", "a") as handle:
        handle.write("\n")
    with pytest.raises(UserError, match="does not match"):
        load_validation_rows(folder, 4)


@pytest.mark.parametrize(("thinking", "opening"), [(True, "<think>\n"), (False, "<think></think>")])
def test_prompts_end_where_the_assistant_starts(data_folder: Path, thinking: bool, opening: str) -> None:
    tokenizer = load_tokenizer(data_folder / "tokenizer")
    rows = load_validation_rows(data_folder, 4)
    for row, prompt in zip(rows, build_prompts(rows, tokenizer, thinking=thinking), strict=True):
        text = tokenizer.decode(prompt.input_ids)
        assert text.endswith(f"Assistant\n{opening}")
        assert prompt.question in text and prompt.task == row["task"]
        assert row["messages"][-1]["content"] not in text
        assert row["messages"][-1]["reasoning_content"] not in text


def test_earlier_turns_stay(data_folder: Path) -> None:
    tokenizer = load_tokenizer(data_folder / "tokenizer")
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns], "task": "addition", "answer": "4"}
    (prompt,) = build_prompts([json.loads(json.dumps(row))], tokenizer, thinking=True)
    text = tokenizer.decode(prompt.input_ids)
    assert "two" in text and "four" not in text and prompt.question == "three"
