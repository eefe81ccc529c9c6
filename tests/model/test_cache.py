"""Decoding over a cache equals the full forward, whatever the pieces, lengths and rows."""

import pytest
import torch

from nanotrain.model.cache import HybridCache
from tests.model.architectures import random_config, random_model, random_tokens

SEEDS = [3, 4, 5, 7, 9, 11, 13]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pieces", [[17], [1] * 17, [9, 1, 1, 4, 2], [2, 15], [1, 16]])
@torch.no_grad()
def test_any_pieces_equal_the_full_forward(seed: int, pieces: list[int]) -> None:
    config = random_config(seed)
    model = random_model(config, seed, torch.float64)
    ids = random_tokens(config, 2, sum(pieces), seed)
    cache = model.new_cache(2)
    logits = torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(ids), rtol=1e-9, atol=1e-9)
    assert cache.lengths.tolist() == [17, 17]


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_rows_of_unequal_length_prefill_decode_and_leave(seed: int) -> None:
    """Right-padded prefill: whatever stands in the padding, each row goes on as if it were alone."""
    config = random_config(seed)
    model = random_model(config, seed, torch.float64)
    lengths = torch.tensor([1, 6, 3, 9])
    ids = random_tokens(config, 4, 20, seed)
    expected = model(ids)
    padded = ids[:, :9].clone()
    padded[torch.arange(9) >= lengths[:, None]] = 0
    cache = model.new_cache(4)
    first = model(padded, cache=cache, num_valid=lengths)
    rows = torch.arange(4)
    torch.testing.assert_close(first[rows, lengths - 1], expected[rows, lengths - 1], rtol=1e-9, atol=1e-9)
    places = lengths.clone()
    for step in range(8):
        if step == 3:
            keep = torch.tensor([0, 3])
            cache.select(keep)
            rows, places = rows[keep], places[keep]
        logits = model(ids[rows, places][:, None], cache=cache)[:, 0]
        torch.testing.assert_close(logits, expected[rows, places], rtol=1e-9, atol=1e-9)
        places = places + 1
    assert torch.equal(cache.lengths, places)


@torch.no_grad()
def test_a_second_padded_piece_continues_rows_of_unequal_length() -> None:
    config = random_config(7)
    model = random_model(config, 1, torch.float64)
    ids = random_tokens(config, 2, 12)
    expected = model(ids)
    cache = model.new_cache(2)
    model(ids[:, :5], cache=cache, num_valid=torch.tensor([2, 5]))
    second = torch.stack([ids[0, 2:6], ids[1, 5:9]])
    logits = model(second, cache=cache, num_valid=torch.tensor([4, 1]))
    torch.testing.assert_close(logits[0], expected[0, 2:6], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits[1, 0], expected[1, 5], rtol=1e-9, atol=1e-9)
    third = torch.stack([ids[0, 6:7], ids[1, 6:7]])
    torch.testing.assert_close(model(third, cache=cache)[:, 0], expected[:, 6], rtol=1e-9, atol=1e-9)


def test_states_are_fp32_in_a_bf16_model() -> None:
    config = random_config(7)
    cache = HybridCache(config, 2, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert {state.dtype for state in cache.ssm_states.values()} == {torch.float32}
    assert {state.dtype for state in cache.conv_states.values()} == {torch.bfloat16}
    model = random_model(config, 0, torch.bfloat16)
    with torch.no_grad():
        model(random_tokens(config, 2, 5), cache=cache)
        model(random_tokens(config, 2, 1), cache=cache)
    assert {state.dtype for state in cache.ssm_states.values()} == {torch.float32}


def test_a_cache_takes_no_segments() -> None:
    config = random_config(7)
    model = random_model(config, 0)
    ids = random_tokens(config, 1, 4)
    with pytest.raises(AssertionError, match="one document"):
        model(ids, segment_ids=torch.zeros_like(ids), cache=model.new_cache(1))
