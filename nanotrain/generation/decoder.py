"""Decodes a batch of sequences one token at a time over one cache; rows may differ in length and leave early.

The idea to know: each row has its own stream of uniform numbers, drawn from (seed, row), and a token is read off the
inverse of the row's distribution. What a row says therefore does not depend on which rows share its batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotrain.config.errors import UserError
from nanotrain.model.hybrid import HybridModel

NUCLEUS_CANDIDATES = (64, 512)
"""Numbers of most probable tokens looked at in turn; the full vocabulary is sorted only in rows they do not cover."""


class BatchDecoder:
    """Prompts in, one token a row a step out.

    Args:
        model: in eval mode.
        prompts: token ids, none empty.
        max_new_tokens: length of each row's stream of random numbers, the most steps that can be taken.
        temperature: 0 = the most probable token.
        top_p: nucleus of the distribution that is sampled from.
        seed: of this call.

    Raises:
        UserError: a prompt is empty, or holds an id outside of the vocabulary.
    """

    def __init__(
        self,
        model: HybridModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> None:
        _check_prompts(prompts, model.config.vocab_size)
        self._model = model
        self._temperature, self._top_p = temperature, top_p
        self._device = model.output_weight().device
        self._cache = model.new_cache(len(prompts))
        self._uniforms = _uniforms(seed, len(prompts), max_new_tokens) if temperature > 0 else None
        self._steps = 0
        self._logits = self._prefill(prompts)

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        input_ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64, device=self._device)
        for row, prompt in enumerate(prompts):
            input_ids[row, : len(prompt)] = torch.tensor(prompt, device=self._device)
        hidden = self._model.hidden_states(input_ids, cache=self._cache, num_valid=lengths)
        last = hidden[torch.arange(len(prompts), device=self._device), lengths - 1]
        return F.linear(last, self._model.output_weight())

    @torch.inference_mode()
    def next_tokens(self) -> list[int]:
        """Return the token that each row would say next; nothing is appended yet."""
        if self._uniforms is None:
            return self._logits.argmax(dim=-1).tolist()
        uniforms = self._uniforms[:, self._steps].to(self._device)
        return sample(self._logits, uniforms, self._temperature, self._top_p).tolist()

    @torch.inference_mode()
    def append(self, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Append `tokens` to the rows that stay.

        Args:
            tokens: one a staying row: what `next_tokens` gave, or what the caller puts in its place.
            rows: indices of the staying rows among the present ones, in rising order.
        """
        if len(rows) < self._cache.batch_size:
            index = torch.tensor(rows, device=self._device)
            self._cache.select(index)
            if self._uniforms is not None:
                self._uniforms = self._uniforms[index.cpu()]
        input_ids = torch.tensor(tokens, device=self._device)[:, None]
        hidden = self._model.hidden_states(input_ids, cache=self._cache)
        self._logits = F.linear(hidden[:, -1], self._model.output_weight())
        self._steps += 1


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Read one token a row off the inverse of its nucleus distribution, most probable token first.

    Args:
        logits: [B, V].
        uniforms: [B] in [0, 1).
        temperature: above 0.
        top_p: the smallest set of most probable tokens whose sum reaches it is sampled from; at least one token.
            1 = all tokens, which are then taken in the order of their ids, as nothing needs sorting.

    Returns:
        [B] int64.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_p >= 1.0:
        return _inverse(torch.softmax(scores, dim=-1), uniforms)
    normaliser = scores.logsumexp(dim=-1, keepdim=True)
    chosen = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
    rows = torch.arange(len(scores), device=scores.device)
    for count in (*NUCLEUS_CANDIDATES, scores.shape[1]):
        if count < scores.shape[1]:
            values, ids = scores[rows].topk(count, dim=-1)
        else:
            values, ids = scores[rows].sort(dim=-1, descending=True, stable=True)
        probabilities = (values - normaliser[rows]).exp()
        before = probabilities.cumsum(dim=-1) - probabilities
        covered = (before[:, -1] + probabilities[:, -1] >= top_p) | (count >= scores.shape[1])
        nucleus = (probabilities * (before < top_p))[covered]
        place = _inverse(nucleus, uniforms[rows[covered]])
        chosen[rows[covered]] = ids[covered].gather(1, place[:, None])[:, 0]
        rows = rows[~covered]
        if len(rows) == 0:
            break
    return chosen


def _inverse(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the column [B] where the running sum of `weights` [B, V] passes the share `uniforms` [B] of the total."""
    cumulative = weights.cumsum(dim=-1)
    target = uniforms[:, None].to(cumulative.dtype) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding may put the target on the very end of the sum: the last column that adds to it is meant.
    return torch.minimum(place, (cumulative < cumulative[:, -1:]).sum(dim=-1))


def _uniforms(seed: int, num_rows: int, num_steps: int) -> Tensor:
    """Return [rows, steps] uniform numbers; a row's are the same in every batch that has the row."""
    streams = []
    for row in range(num_rows):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)
        streams.append(torch.rand(num_steps, generator=generator))
    return torch.stack(streams)


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {row} is empty; a model continues at least one token.")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UserError(
                f"prompt {row} holds a token id outside of the model's vocabulary ({vocab_size}); tokenise it with the"
                " tokenizer of the model's own folder."
            )
