"""A chat turn against greedy decoding by whole forward passes, through the tokenizer's own template."""

from pathlib import Path

import pytest
import torch

from nanotrain.checkpoint.hf_folder import load_model, load_tokenizer, save_model
from nanotrain.config.errors import UserError
from nanotrain.config.model import ModelConfig
from nanotrain.data.tokenizer import build_tokenizer, save_tokenizer
from nanotrain.generation.chat import ChatSession
from nanotrain.model.hybrid import HybridModel

LENGTH = 24
CONFIG = ModelConfig(
    hybrid_layer_pattern="M-*",
    vocab_size=1256,
    hidden_size=16,
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=2,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=1,
    chunk_size=8,
    initializer_range=0.4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    save_tokenizer(build_tokenizer(r"\S+|\s+", [bytes([byte]) for byte in range(256)]), root / "tokenizer")
    model = HybridModel(CONFIG)
    model.init_weights(5)
    with torch.no_grad():  # bytes only, so that the text is decodable, and no stop token
        model.lm_head.weight[:1000] = 0
        model.lm_head.weight[1000:] += 0.3 * torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    save_model(model, root / "hf", tokenizer_from=root / "tokenizer")
    return root / "hf"


@torch.no_grad()
def greedy(folder: Path, text: str, count: int) -> list[int]:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = tokenizer.encode(text, add_special_tokens=False)
    new: list[int] = []
    while len(new) < count:
        new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return new


def prompt_of(folder: Path, messages: list[dict], **mode: bool) -> str:
    template = load_tokenizer(folder).apply_chat_template
    return template(messages, tokenize=False, add_generation_prompt=True, **mode)


def test_the_pieces_join_to_the_greedy_answer_and_the_turns_are_remembered(folder):
    session = ChatSession(folder, temperature=0, max_new_tokens=LENGTH)
    tokenizer = load_tokenizer(folder)
    prompt = prompt_of(folder, [{"role": "user", "content": "Hello"}])
    assert prompt.endswith("<think>\n")
    first = "".join(session.reply("Hello"))
    assert first == "<think>\n" + tokenizer.decode(greedy(folder, prompt, LENGTH))
    second = "".join(session.reply("And?"))
    assert [message["role"] for message in session.messages] == ["user", "assistant", "user", "assistant"]
    prompt = prompt_of(folder, session.messages[:3])
    assert second == "<think>\n" + tokenizer.decode(greedy(folder, prompt, LENGTH))


def test_without_thinking_the_answer_starts_at_once(folder):
    session = ChatSession(folder, temperature=0, max_new_tokens=LENGTH, thinking=False)
    prompt = prompt_of(folder, [{"role": "user", "content": "Hello"}], enable_thinking=False)
    assert prompt.endswith("<think></think>")
    text = "".join(session.reply("Hello"))
    assert text == load_tokenizer(folder).decode(greedy(folder, prompt, LENGTH))


def test_a_turn_in_the_text_switches_the_mode(folder):
    session = ChatSession(folder, temperature=0, max_new_tokens=4)
    assert not "".join(session.reply("Hello /no_think")).startswith("<think>")
    assert "".join(session.reply("Hello /think")).startswith("<think>")


def test_a_budget_closes_the_trace(folder):
    session = ChatSession(folder, temperature=0, max_new_tokens=600, thinking_budget=3)
    text = "".join(session.reply("Hello"))
    assert text.count("</think>") == 1


def test_a_tokenizer_without_template_is_one_sentence(folder, tmp_path):
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink(missing_ok=True)
    save_model(model, tmp_path / "hf", tokenizer_from=tmp_path / "tokenizer")
    with pytest.raises(UserError, match="without chat template; export a model that went through sft"):
        ChatSession(tmp_path / "hf")
