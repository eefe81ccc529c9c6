"""A conversation with an exported model, one turn at a time, streamed as text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanotrain.checkpoint.hf_folder import load_model, load_tokenizer
from nanotrain.config.errors import UserError
from nanotrain.generation.budget import THINK_CLOSE, ThinkingRow
from nanotrain.generation.decoder import BatchDecoder

REPLACEMENT = "\ufffd"
"""What a decoder shows for a character whose bytes have not all arrived."""


class ChatSession:
    """Keeps the messages; earlier traces are dropped by the chat template, /think and /no_think switch the mode.

    Args:
        folder: an exported model with tokenizer and chat template.
        thinking_budget: tokens of thinking a turn; None = unlimited.
        thinking: False starts every turn with an empty trace; None leaves the choice to /think and /no_think.
        max_new_tokens: most tokens a turn.
        temperature: 0 = greedy.
        top_p: nucleus.
        seed: of the first turn; each turn has its own.

    Raises:
        UserError: the folder holds no chat template, or no model.
    """

    def __init__(
        self,
        folder: Path,
        *,
        thinking_budget: int | None = None,
        thinking: bool | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.6,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> None:
        self._model = load_model(folder)
        self._tokenizer = load_tokenizer(folder)
        if self._tokenizer.chat_template is None:
            raise UserError(f"{folder} has a tokenizer without chat template; export a model that went through sft.")
        self._budget, self._thinking = thinking_budget, thinking
        self._limits = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        self._seed = seed
        self._stop_ids = _stop_ids(self._tokenizer)
        self.messages: list[dict[str, Any]] = []

    def reply(self, text: str) -> Iterator[str]:
        """Yield the answer to a user's turn in pieces, the trace included, and remember both."""
        self.messages.append({"role": "user", "content": text})
        prompt = self._tokenizer.apply_chat_template(
            self.messages, tokenize=False, add_generation_prompt=True, **self._mode()
        )
        opened = not prompt.endswith(THINK_CLOSE)
        yield "<think>\n" if opened else ""
        row = ThinkingRow(
            self._tokenizer,
            budget=self._budget if opened else None,
            grace=500,
            max_new_tokens=int(self._limits["max_new_tokens"]),
            stop_ids=self._stop_ids,
        )
        yield from self._stream(self._tokenizer.encode(prompt, add_special_tokens=False), row)
        answer = row.result().text
        self.messages.append({"role": "assistant", "content": answer.split(THINK_CLOSE)[-1].strip()})
        self._seed += 1

    def _mode(self) -> dict[str, bool]:
        return {} if self._thinking is None else {"enable_thinking": self._thinking}

    def _stream(self, prompt_ids: list[int], row: ThinkingRow) -> Iterator[str]:
        decoder = BatchDecoder(self._model, [prompt_ids], seed=self._seed, **self._limits)
        shown = ""
        while not row.done:
            token = row.choose(decoder.next_tokens()[0])
            row.accept(token)
            if row.done:
                break
            decoder.append([token], [0])
            whole = self._tokenizer.decode(row.ids)
            if not whole.endswith(REPLACEMENT):
                yield whole[len(shown) :]
                shown = whole
        yield self._tokenizer.decode(row.ids)[len(shown) :]


def _stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of the end-of-text token and of the end-of-turn marker, as far as the tokenizer has them."""
    ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<SPECIAL_12>")}
    return tuple(sorted(i for i in ids if i is not None and i != tokenizer.unk_token_id))
