"""Held-out chat rows as prompts for the model."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nanotrain.config.errors import UserError
from nanotrain.data import chat
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
        UserError: the file is missing, does not match the manifest, is not JSON lines, or holds fewer rows.
    """
    file = DataFolder(data_folder).file("chat/validation.jsonl")
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    if len(lines) < num_prompts:
        raise UserError(
            f"`stage.num_prompts` ({num_prompts}) exceeds the {len(lines)} rows of {file}; lower it, or raise"
            " `stage.corpus.num_chat_validation_rows` of the prepare stage."
        )
    lines.sort(key=lambda line: hashlib.sha256(line).digest())
    try:
        return [json.loads(line) for line in lines[:num_prompts]]
    except ValueError as error:
        raise UserError(f"{file} is not JSON lines ({error}); run the prepare stage again.") from error


def build_prompts(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, thinking: bool) -> list[Prompt]:
    """Render and tokenise conversations up to the last assistant turn, with `<think>` opened, or opened and shut."""
    prompts = []
    for row in rows:
        messages = row["messages"]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        text = chat.render(messages, add_generation_prompt=True, thinking=thinking)
        input_ids = tokenizer.encode(text, add_special_tokens=False)
        prompts.append(Prompt(row, messages[-1]["content"], input_ids))
    return prompts
