"""Tokenise + pack + write against a loop of HF `tokenizers` through megatron-core's builder: `python -m tests.benchmarks.bench_tokenize DATA_FOLDER`.

DATA_FOLDER is a product of the prepare stage; its categories' texts are decoded back to jsonl. One process, one thread
on both sides, tokenizer loading left out on both, a fresh encoder (cold caches) in every repetition, sides interleaved.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nanotrain.data.chunk_encoder import ChunkEncoder, append_eos
from nanotrain.data.corpus import TEKKEN_MEMBER, TEKKEN_PACKAGE
from nanotrain.data.encoders import HfEncoder, known_encoder
from nanotrain.data.pip_mini import PACKAGES
from nanotrain.data.record_files import plan_chunks, read_chunk
from nanotrain.data.token_shards import TokenShard, TokenShardWriter, smallest_dtype
from nanotrain.data.tokenizer import (
    NUM_SPECIALS,
    build_tokenizer,
    load_tokenizer_json,
    plain_tokenizer,
    read_tekken,
    save_tokenizer,
)
from nanotrain.data.wheels import WheelReader, cache_folder, ensure_wheels

CATEGORIES = ("web", "code", "multilingual", "math", "sft")
EOS = 2


def write_texts(data_folder: Path, category: str, file: Path) -> None:
    tokenizer = load_tokenizer_json(data_folder / "tokenizer")
    texts = []
    for split in ("train", "validation"):
        shard = TokenShard(data_folder / category / split)
        ids = [shard.document(i)[:-1].tolist() for i in range(shard.num_documents)]
        texts += tokenizer.decode_batch(ids, skip_special_tokens=False)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def full_tokenizer(folder: Path) -> Path:
    """The published vocabulary of 131,072 ids."""
    wheels = ensure_wheels([p for p in PACKAGES if p.name == TEKKEN_PACKAGE], cache_folder())
    with WheelReader(wheels[TEKKEN_PACKAGE]) as reader:
        pattern, tokens = read_tekken(reader.read_bytes(TEKKEN_MEMBER), 131072 - NUM_SPECIALS)
    save_tokenizer(build_tokenizer(pattern, tokens), folder)
    return folder


def theirs(file: Path, tokenizer, dtype, prefix: Path) -> float:
    """What Megatron's preprocessing does for each line, in one process."""
    start = time.perf_counter()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
            ids.append(EOS)
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return time.perf_counter() - start


def ours(file: Path, encoder, exact: HfEncoder, dtype, prefix: Path) -> float:
    """tokenize_files' loop in one process, fsync included."""
    start = time.perf_counter()
    encode = ChunkEncoder(encoder, exact, "text", EOS, dtype)
    writer = TokenShardWriter(prefix, dtype)
    for chunk in plan_chunks(file):
        encoded = encode(chunk)
        writer.add_documents(encoded.tokens, encoded.lengths)
    writer.finish()
    return time.perf_counter() - start


def parts(file: Path, encoder, dtype, prefix: Path) -> dict[str, float]:
    """Seconds of each part, warm."""
    seconds, mark = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal mark
        now = time.perf_counter()
        seconds[name] = seconds.get(name, 0.0) + now - mark
        mark = now

    texts = [record["text"] for chunk in plan_chunks(file) for record in read_chunk(chunk, ["text"])]
    lap("read and parse")
    ids, lengths = encoder.encode_batch(texts)
    lap("encode")
    tokens, longer = append_eos(ids, lengths, EOS, dtype)
    lap("eos and dtype")
    writer = TokenShardWriter(prefix, dtype)
    writer.add_documents(tokens, longer)
    writer.seal()
    lap("write, index, fsync")
    return seconds


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data_folder", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    libraries = " ".join(f"{name} {version(name)}" for name in ("gigatoken", "tiktoken", "tokenizers", "megatron-core"))
    print(f"{libraries} python {platform.python_version()}\n")
    print(
        "| vocabulary | text | MB | Mtokens | theirs, Mtok/s | ours, Mtok/s | ours, MB/s | with tiktoken, Mtok/s | ratio | bytes |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    breakdown = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for folder in (full_tokenizer(root / "tokenizer"), options.data_folder / "tokenizer"):
            tokenizer = plain_tokenizer(folder)
            size = tokenizer.get_vocab_size()
            dtype = smallest_dtype(size)
            for category in CATEGORIES:
                file = root / f"{category}.jsonl"
                if not file.exists():
                    write_texts(options.data_folder, category, file)
                num_bytes = sum(len(json.loads(line)["text"].encode()) for line in file.read_text().splitlines())
                times: dict[str, list[float]] = {"theirs": [], "gigatoken": [], "tiktoken": []}
                for _ in range(options.repetitions):
                    times["theirs"].append(theirs(file, tokenizer, dtype, root / "theirs"))
                    for name in ("gigatoken", "tiktoken"):
                        encoder, exact = known_encoder(folder, name)
                        encoder.encode_batch(["é"])  # loads lazy tables
                        times[name].append(ours(file, encoder, exact, dtype, root / name))
                        if name == "gigatoken":
                            warm = parts(file, encoder, dtype, root / "parts")
                same = all(
                    (root / f"theirs.{end}").read_bytes() == (root / f"{name}.{end}").read_bytes()
                    for end in ("bin", "idx")
                    for name in ("gigatoken", "tiktoken")
                )
                tokens = TokenShard(root / "gigatoken").num_tokens
                rate = {name: [tokens / t / 1e6 for t in ts] for name, ts in times.items()}
                ratio = [a / b for a, b in zip(times["theirs"], times["gigatoken"], strict=True)]
                print(
                    f"| {size:,} | {category} | {num_bytes / 1e6:.2f} | {tokens / 1e6:.2f} | {shown(rate['theirs'])} |"
                    f" {shown(rate['gigatoken'])} | {num_bytes / statistics.median(times['gigatoken']) / 1e6:.0f} |"
                    f" {shown(rate['tiktoken'])} | {shown(ratio)} | {'identical' if same else 'DIFFERENT'} |",
                    flush=True,
                )
                breakdown.append((size, category, warm))
    print(
        "\n| vocabulary | text | read and parse | encode (warm) | eos and dtype | write, index, fsync |\n|---|---|---|---|---|---|"
    )
    for size, category, warm in breakdown:
        total = sum(warm.values())
        print(
            f"| {size:,} | {category} | "
            + " | ".join(f"{np.round(100 * s / total):.0f}%" for s in warm.values())
            + " |"
        )


if __name__ == "__main__":
    main()
