"""Held-out chat rows as prompts for the model."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nanotrain.config.errors import UserError
from nanotrain.data import chat
from nanotrain.data.chat_rows import load_rows
from nanotrain.data.manifest import DataFolder


@dataclass(frozen=True)
class Prompt:
    """A verifiable question, ready to be continued."""

    row: dict[str, Any]
    """As in chat/validation.jsonl; `data.tasks.score` needs it."""
    question: str
    """What the user says last."""
    input_ids: list[int]
    """The rendered conversation up to where the assistant starts."""

    @property
    def task(self) -> str:
        return self.row["task"]


def load_validation_rows(data_folder: Path, num_prompts: int) -> list[dict[str, Any]]:
    """Return `num_prompts` held-out chat rows: the same ones for the same rows, whatever their order in the file.

    Rows are sorted by a digest of their content, so tasks are mixed and a larger `num_prompts` keeps the smaller set.

    Raises:
        UserError: the file is missing, does not match the manifest, is not chat rows, or holds fewer rows.
    """
    file = DataFolder(data_folder).file("chat/validation.jsonl")
    rows = load_rows(file)
    if len(rows) < num_prompts:
        raise UserError(
            f"`stage.num_prompts` ({num_prompts}) exceeds the {len(rows)} rows of {file}; lower it, or raise"
            " `stage.corpus.num_chat_validation_rows` of the prepare stage."
        )
    rows.sort(key=lambda row: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest())
    return rows[:num_prompts]


def build_prompts(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, thinking: bool) -> list[Prompt]:
    """Render and tokenise conversations up to the last assistant turn, with `<think>` opened, or opened and shut."""
    prompts = []
    for row in rows:
        messages = row["messages"][:-1]  # the last one is the assistant's, as load_rows made sure
        text = chat.render(messages, add_generation_prompt=True, thinking=thinking)
        input_ids = tokenizer.encode(text, add_special_tokens=False)
        prompts.append(Prompt(row, messages[-1]["content"], input_ids))
    return prompts
