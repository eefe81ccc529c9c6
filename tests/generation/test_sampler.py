"""Batched generation against one prompt at a time through the full forward, and the nucleus against brute force."""

import math

import pytest
import torch

from nanotrain.config.errors import UserError
from nanotrain.generation.decoder import NUCLEUS_CANDIDATES, sample
from nanotrain.generation.sampler import generate
from nanotrain.model.hybrid import HybridModel


def greedy_by_full_forward(model: HybridModel, prompt: list[int], count: int, stop_ids: set[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] in stop_ids:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("stop_ids", [set(), {3, 17, 31, 44}])
def test_greedy_batch_equals_full_forward_alone(
    tiny_model: HybridModel, prompts: list[list[int]], stop_ids: set[int]
) -> None:
    outputs = generate(tiny_model, prompts, max_new_tokens=15, stop_ids=stop_ids, temperature=0.0)
    assert outputs == [greedy_by_full_forward(tiny_model, prompt, 15, stop_ids) for prompt in prompts]


def test_a_row_says_the_same_whoever_shares_its_batch(tiny_model: HybridModel, prompts: list[list[int]]) -> None:
    options = {"max_new_tokens": 12, "stop_ids": {7, 8}, "temperature": 1.0, "top_p": 0.9, "seed": 11}
    together = generate(tiny_model, prompts, **options)
    assert generate(tiny_model, prompts[:1], **options) == together[:1]
    assert generate(tiny_model, prompts[:3], **options) == together[:3]
    assert generate(tiny_model, prompts, **{**options, "seed": 12}) != together


def test_nothing_asked_for_gives_nothing(tiny_model: HybridModel) -> None:
    assert generate(tiny_model, [], max_new_tokens=4, stop_ids=(), temperature=0.0) == []
    assert generate(tiny_model, [[1]], max_new_tokens=0, stop_ids=(), temperature=0.0) == [[]]


@pytest.mark.parametrize("prompt", [[], [50], [-1]])
def test_bad_prompts_are_refused(tiny_model: HybridModel, prompt: list[int]) -> None:
    with pytest.raises(UserError, match="prompt 1"):
        generate(tiny_model, [[1], prompt], max_new_tokens=2, stop_ids=(), temperature=0.0)


@pytest.mark.parametrize("vocabulary", [10, *(count + 40 for count in NUCLEUS_CANDIDATES)])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_sample_reads_the_inverse_of_the_nucleus(vocabulary: int, top_p: float) -> None:
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(vocabulary), dtype=torch.float64)
    temperature = 0.7
    weights = [math.exp(value / temperature) for value in logits[0].tolist()]
    order = sorted(range(vocabulary), key=lambda i: -weights[i])
    nucleus, total = [], 0.0
    for i in order:
        nucleus.append(i)
        total += weights[i] / sum(weights)
        if total >= top_p - 1e-9:
            break
    uniforms = (torch.arange(400) + 0.5) / 400
    drawn = sample(logits.expand(400, -1), uniforms, temperature, top_p).tolist()
    assert set(drawn) <= set(nucleus)
    share = sum(weights[i] for i in nucleus)
    expected = weights[nucleus[0]] / share
    assert abs(drawn.count(nucleus[0]) / 400 - expected) < 0.01
    assert drawn == sorted(drawn, key=nucleus.index if top_p < 1 else None)


def test_rows_of_one_batch_need_different_numbers_of_candidates() -> None:
    """A peaked row, one that 512 candidates cover, and a flat one that needs all: each as if it were alone."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([9.0, 1.5, 0.01])[:, None]
    logits = torch.randn(3, 2000, generator=generator) * spread
    uniforms = torch.tensor([0.3, 0.97, 0.999])
    together = sample(logits, uniforms, 1.0, 0.95).tolist()
    assert together == [int(sample(logits[i : i + 1], uniforms[i : i + 1], 1.0, 0.95)) for i in range(3)]
    for row, token in enumerate(together):
        probabilities, order = torch.softmax(logits[row].double(), dim=-1).sort(descending=True)
        place = order.tolist().index(token)
        size = int((probabilities.cumsum(0) < 0.95).sum()) + 1
        share = probabilities[:size].cumsum(0) / probabilities[:size].sum()
        assert abs(int(torch.searchsorted(share, uniforms[row].double(), right=True)) - place) <= 1
