"""Generation under a thinking budget (paper section 3.4).

Tokens are counted from the start of the `<think>` block. At the budget nothing is cut at once: at the next newline
`</think>` is put in; where no newline comes within `grace` tokens it is put in there; then the model goes on freely.
The tag is ordinary text of one or more tokens, so it is looked for in decoded text and never by id. Only the tag itself
is put in: what follows it (a blank line, the answer) is the model's own, as after a tag that it writes itself.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from nanotrain.generation.decoder import BatchDecoder
from nanotrain.model.hybrid import HybridModel

THINK_CLOSE = "</think>"
_TAIL_TOKENS = 2 * len(THINK_CLOSE)
"""The tag spans at most one token a byte; twice that also survives a character cut at the window's start."""


class TextCodec(Protocol):
    """What is needed of a transformers tokenizer."""

    def decode(self, ids: list[int]) -> str: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class BudgetResult:
    """One response to a prompt that ends in an opened `<think>` block."""

    text: str
    """Everything after the prompt, the stop token left out."""
    thinking_tokens: int
    """Before `</think>`; all of them when the tag never came."""
    answer_tokens: int
    """After `</think>`, the stop token left out."""
    forced: bool
    """The budget put `</think>` in."""
    well_formed: bool
    """Exactly one `</think>`, forced or natural."""
    finished: bool
    """Ended with a stop token, not at the limit."""


class ThinkingRow:
    """The state of one response: thinking, then answering, then done.

    Args:
        codec: the tokenizer.
        budget: tokens; None = unlimited.
        grace: tokens after the budget within which a newline is waited for.
        max_new_tokens: most tokens in all, the ones put in included.
        stop_ids: end the response in either state.
    """

    def __init__(
        self, codec: TextCodec, *, budget: int | None, grace: int, max_new_tokens: int, stop_ids: Collection[int]
    ) -> None:
        self._codec, self._budget, self._grace = codec, budget, grace
        self._max_new_tokens, self._stop_ids = max_new_tokens, stop_ids
        self._pending: list[int] = []
        self._tag_tokens = 0
        self.ids: list[int] = []
        self.thinking_tokens: int | None = None
        self.forced = False
        self.finished = False

    @property
    def done(self) -> bool:
        return self.finished or len(self.ids) >= self._max_new_tokens

    def begin(self) -> None:
        """Put the tag in at once where not even one token of thinking is allowed."""
        if self._budget == 0 and self._grace == 0:
            self._force()

    def choose(self, proposed: int) -> int:
        """Return the token that comes next: one that is being put in, or the model's."""
        return self._pending.pop(0) if self._pending else proposed

    def accept(self, token: int) -> None:
        """Append a token and move on to the next state where it calls for it."""
        if token in self._stop_ids and not self._pending:
            self.finished = True
            return
        self.ids.append(token)
        if self.thinking_tokens is None:
            self._think()

    def _think(self) -> None:
        tail = self._codec.decode(self.ids[-_TAIL_TOKENS:])
        if THINK_CLOSE in tail:
            self.thinking_tokens = self._tokens_before_tag()
            self._tag_tokens = len(self.ids) - self.thinking_tokens
            return
        if self._budget is None or len(self.ids) < self._budget:
            return
        newline = "\n" in self._codec.decode(self.ids[-1:])
        if newline or len(self.ids) >= self._budget + self._grace:
            self._force()

    def _force(self) -> None:
        self._pending = self._codec.encode(THINK_CLOSE, add_special_tokens=False)
        self.thinking_tokens = len(self.ids)
        self._tag_tokens = len(self._pending)
        self.forced = True

    def _tokens_before_tag(self) -> int:
        """Return how many tokens end before the tag starts, having just seen it complete."""
        count = len(self.ids) - 1
        while count > 0 and THINK_CLOSE not in self._codec.decode(self.ids[count:]):
            count -= 1
        return count

    def result(self) -> BudgetResult:
        """Return the response as far as it got."""
        text = self._codec.decode(self.ids)
        thinking = len(self.ids) if self.thinking_tokens is None else self.thinking_tokens
        answer = max(len(self.ids) - thinking - self._tag_tokens, 0)
        well_formed = text.count(THINK_CLOSE) == 1
        return BudgetResult(text, thinking, answer, self.forced, well_formed, self.finished)


def generate_with_budget(
    model: HybridModel,
    tokenizer: TextCodec,
    prompts: Sequence[Sequence[int]],
    *,
    budget: int | None,
    grace: int = 500,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop_ids: Collection[int],
) -> list[BudgetResult]:
    """Answer prompts that end in an opened `<think>` block.

    Args:
        model: in eval mode.
        tokenizer: of the model's folder.
        prompts: token ids, each ending where the trace starts.
        budget: thinking tokens; None = unlimited.
        grace: see the module's text; 500 as published.
        max_new_tokens: most tokens a response.
        temperature: 0 = greedy.
        top_p: nucleus.
        seed: a row's draws depend on it and on the row's place.
        stop_ids: end a response.

    Returns:
        One result a prompt, in order.
    """
    rows = [
        ThinkingRow(tokenizer, budget=budget, grace=grace, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        for _ in prompts
    ]
    if not rows:
        return []
    for row in rows:
        row.begin()
    decoder = BatchDecoder(
        model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    active = rows
    while True:
        tokens = [row.choose(token) for row, token in zip(active, decoder.next_tokens(), strict=True)]
        for row, token in zip(active, tokens, strict=True):
            row.accept(token)
        staying = [place for place, row in enumerate(active) if not row.done]
        if not staying:
            return [row.result() for row in rows]
        decoder.append([tokens[place] for place in staying], staying)
        active = [active[place] for place in staying]
