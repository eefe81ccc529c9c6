"""A small real BPE in the published file's form, and data folders written by our own writers."""

import base64
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from nanotrain.data.chat_rows import save_rows
from nanotrain.data.manifest import write_manifest
from nanotrain.data.tasks import ANSWER_FORM, TASKS, make_problem
from nanotrain.data.token_shards import TokenShardWriter
from nanotrain.data.tokenizer import NUM_SPECIALS, build_tokenizer, read_tekken, save_tokenizer
from nanotrain.runtime.files import file_digest

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLE = (
    "The answer is what stands after the trace. <think>\nähnlich здравствуй 日本語 answer think stands\n</think>\n\n"
    * 3
)


def _byte_of() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@pytest.fixture(scope="session")
def tekken_json() -> bytes:
    """A trained byte-level BPE of 400 ranks, in tekken's JSON form."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([SAMPLE, " ".join(str(i) for i in range(50)), "take add sort count " * 9], trainer)
    table = _byte_of()
    tokens = [bytes(table[c] for c in token) for token, _ in sorted(trained.get_vocab().items(), key=lambda kv: kv[1])]
    vocabulary = [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(tokens)]
    return json.dumps({"config": {"pattern": PATTERN}, "vocab": vocabulary}).encode()


@pytest.fixture(scope="session")
def num_ranks(tekken_json) -> int:
    return len(json.loads(tekken_json)["vocab"])


@pytest.fixture(scope="session")
def tokenizer_folder(tekken_json, num_ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tokenizer"
    save_tokenizer(build_tokenizer(*read_tekken(tekken_json, num_ranks)), folder)
    return folder


def load_by_path(file: Path):
    """Import a module of the tests; test folders are no packages."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_shard(prefix: Path, documents: list[list[int]], dtype=np.uint16) -> None:
    writer = TokenShardWriter(prefix, dtype)
    for document in documents:
        writer.add_document(document)
    writer.finish()


def make_chat_rows(count: int) -> list[dict]:
    rows = []
    for number in range(count):
        task = sorted(TASKS)[number % len(TASKS)]
        problem = make_problem(task, number)
        reply = {"role": "assistant", "reasoning_content": problem.trace, "content": ANSWER_FORM.format(problem.answer)}
        messages = [{"role": "user", "content": problem.prompt}, reply]
        rows.append({"messages": messages, "task": task, "answer": problem.answer, "metadata": {"family": f"{number}"}})
    return rows


def make_data_folder(folder: Path, tokenizer_folder: Path, sources: dict[str, list[list[int]]], rows: int = 40) -> Path:
    """Write a whole data folder with the given documents as both splits of each category."""
    names = []
    for category, documents in sources.items():
        for split in ("train", "validation"):
            write_shard(folder / category / split, documents)
            names += [f"{category}/{split}.bin", f"{category}/{split}.idx"]
    save_rows(make_chat_rows(rows), folder / "chat/train.jsonl")
    digest = file_digest(tokenizer_folder / "tokenizer.json")
    write_manifest(folder, {"tokenizer_digest": digest, "vocab_size": NUM_SPECIALS + 300}, [*names, "chat/train.jsonl"])
    return folder


@pytest.fixture(scope="session")
def write_data_folder(tokenizer_folder):
    """Return a function (folder, sources) -> folder."""
    return lambda folder, sources: make_data_folder(folder, tokenizer_folder, sources)


@pytest.fixture(scope="session")
def fake_packages():
    """The module fake_packages.py beside this file."""
    return load_by_path(Path(__file__).with_name("fake_packages.py"))


@pytest.fixture(scope="session")
def fake_wheels(fake_packages, tekken_json, tmp_path_factory) -> dict[str, Path]:
    return fake_packages.make_wheels(tmp_path_factory.mktemp("wheels"), tekken_json)
