"""A prepared data folder with a byte-level tokenizer, and a tiny hybrid model that fits it."""

from pathlib import Path

import numpy as np
import pytest

from nanotrain.config.data import CATEGORIES
from nanotrain.config.model import ModelConfig
from nanotrain.data.chat_rows import save_rows
from nanotrain.data.manifest import write_manifest
from nanotrain.data.tasks import ANSWER_FORM, make_problem
from nanotrain.data.token_shards import TokenShardWriter
from nanotrain.data.tokenizer import build_tokenizer, save_tokenizer
from nanotrain.model.hybrid import HybridModel
from nanotrain.runtime.files import file_digest

MERGED = [b"th", b"the", b"an", b"\xc3\xa9"]
VOCABULARY = 1000 + 256 + len(MERGED)
DOCUMENT_LENGTHS = {"web": (30, 17, 2, 60), "math": (70,), "code": (9, 9), "multilingual": (33, 41), "sft": (5, 6, 7)}


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    bytes_and_merges = [*(bytes([byte]) for byte in range(256)), *MERGED]
    save_tokenizer(build_tokenizer(r"\S+|\s+", bytes_and_merges), folder / "tokenizer")
    files = [f"tokenizer/{file.name}" for file in sorted((folder / "tokenizer").iterdir())]
    draw = np.random.default_rng(0)
    for category in CATEGORIES:
        writer = TokenShardWriter(folder / category / "validation", np.uint16)
        for length in DOCUMENT_LENGTHS[category]:
            writer.add_document([*draw.integers(1000, VOCABULARY, length - 1), 2])
        writer.finish()
        files += [f"{category}/validation.bin", f"{category}/validation.idx"]
    save_rows([_row(task, number) for number in range(8) for task in ("addition", "sorting")], _chat(folder))
    write_manifest(
        folder,
        {"tokenizer_digest": file_digest(folder / "tokenizer" / "tokenizer.json"), "sources": []},
        [*files, "chat/validation.jsonl"],
    )
    return folder


def _chat(folder: Path) -> Path:
    (folder / "chat").mkdir()
    return folder / "chat" / "validation.jsonl"


def _row(task: str, number: int) -> dict:
    problem = make_problem(task, number)
    reply = {"role": "assistant", "reasoning_content": problem.trace, "content": ANSWER_FORM.format(problem.answer)}
    messages = [{"role": "user", "content": problem.prompt}, reply]
    return {"messages": messages, "task": task, "answer": problem.answer, "metadata": {"family": str(number)}}


@pytest.fixture(scope="session")
def model() -> HybridModel:
    config = ModelConfig(
        hybrid_layer_pattern="M-*",
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        mamba_num_heads=2,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
        initializer_range=0.3,
    )
    model = HybridModel(config)
    model.init_weights(7)
    return model.eval()
