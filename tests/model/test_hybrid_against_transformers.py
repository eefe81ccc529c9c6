"""transformers' NemotronH is the oracle, except for small dt, where the fp64 recurrence is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nanotrain.checkpoint.hf_folder import load_model, load_state_dict, save_model
from nanotrain.model import mixers
from nanotrain.model.hybrid import HybridModel
from nanotrain.ops.ssd import ssd_scan_ref
from tests.model.architectures import random_config, random_model, random_tokens

NUM_CONFIGS = 24


def load_theirs(folder: Path) -> Any:
    return transformers.NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(model: HybridModel, prompts: torch.Tensor, count: int) -> torch.Tensor:
    cache = model.new_cache(len(prompts))
    tokens, new = prompts, prompts
    for _ in range(count):
        new = model(new, cache=cache)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


def greedy_by_full_forward(forward, prompts: torch.Tensor, count: int) -> torch.Tensor:
    tokens = prompts
    for _ in range(count):
        tokens = torch.cat([tokens, forward(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("seed", range(NUM_CONFIGS))
@torch.no_grad()
def test_logits_greedy_tokens_and_round_trip(seed: int, tmp_path: Path) -> None:
    config = random_config(seed)
    ours = random_model(config, seed)
    save_model(ours, tmp_path / "ours")
    theirs = load_theirs(tmp_path / "ours")

    ids = random_tokens(config, 2, 2 * config.chunk_size + 3, seed)  # not a multiple of the chunk
    expected = theirs(ids, use_cache=False).logits
    assert float((load_model(tmp_path / "ours")(ids) - expected).abs().max()) < 1e-4
    assert float((ours(ids[:, :1]) - theirs(ids[:, :1], use_cache=False).logits).abs().max()) < 1e-4

    prompts = ids[:, : config.chunk_size + 1]
    tokens = greedy(ours, prompts, 10)
    assert torch.equal(tokens, greedy_by_full_forward(ours, prompts, 10))
    assert torch.equal(tokens, greedy_by_full_forward(lambda t: theirs(t, use_cache=False).logits, prompts, 10))

    theirs.save_pretrained(tmp_path / "theirs")
    stored, state = load_state_dict(tmp_path / "theirs"), ours.state_dict()
    back = load_model(tmp_path / "theirs")
    assert back.config == config
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)
    save_model(back, tmp_path / "again")
    assert all(
        torch.equal(a, b)
        for a, b in zip(load_theirs(tmp_path / "again").parameters(), theirs.parameters(), strict=True)
    )


@torch.no_grad()
def test_their_cached_generation_gives_the_same_tokens(tmp_path: Path) -> None:
    config = random_config(7)  # holds all three mixers; without attention their cache raises
    ours = random_model(config, 3)
    save_model(ours, tmp_path / "hf")
    theirs = load_theirs(tmp_path / "hf")
    theirs.generation_config.eos_token_id = None
    prompts = random_tokens(config, 3, config.chunk_size + 2)
    expected = theirs.generate(prompts, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompts))
    assert torch.equal(greedy(ours, prompts, 12), expected)


@pytest.mark.parametrize("dt_bias", [-12.0, -9.0, -6.0])
@torch.no_grad()
def test_small_dt(dt_bias: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published recurrence does not clamp dt. A folder of ours makes transformers compute it; a dt floor does not."""
    config = random_config(7)
    ours = random_model(config, 5)
    for name, parameter in ours.named_parameters():
        if name.endswith("dt_bias"):
            parameter.fill_(dt_bias)
        if name.endswith(".D"):
            parameter.zero_()  # the skip connection would hide the state
        if name.endswith("in_proj.weight"):
            parameter[-config.mamba_num_heads :] *= 0.1
    ids = random_tokens(config, 2, 3 * config.chunk_size + 1)
    save_model(ours, tmp_path / "hf")
    theirs = load_theirs(tmp_path / "hf")
    stored = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(stored | {"time_step_min": 0.001}))
    floored = load_theirs(tmp_path / "hf")

    actual, logits = ours(ids), theirs(ids, use_cache=False).logits
    with monkeypatch.context() as patch:
        patch.setattr(mixers, "ssd_scan", ssd_scan_ref)
        judge = load_model(tmp_path / "hf", dtype=torch.float64)(ids)
    assert judge.dtype == torch.float64
    assert float((actual - judge).abs().max()) < 1e-4
    assert float((logits - judge).abs().max()) < 1e-4
    if dt_bias <= -9:
        assert float((floored(ids, use_cache=False).logits - judge).abs().max()) > 1e-3

    cache = ours.new_cache(len(ids))
    steps = [ours(ids[:, t : t + 1], cache=cache) for t in range(ids.shape[1])]
    assert float((torch.cat(steps, dim=1) - judge).abs().max()) < 1e-4
